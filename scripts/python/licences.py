"""Fails if a dependency in Cargo.lock has a licence that is not on the list, is not from the registry, or was yanked.

Reads `cargo metadata` and cargo's own copy of the registry's index, as fresh as cargo's last look at it.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "PostgreSQL", "Unicode-3.0", "Unlicense", "Zlib",
}  # fmt: skip


def allowed(expression):
    """Returns whether the licences above satisfy an SPDX expression. `/` is an old way to write OR."""
    tokens = re.findall(r"\(|\)|/|[^\s()/]+(?:\s+WITH\s+[^\s()/]+)?", expression or "")
    words = {"OR": "or", "/": "or", "AND": "and", "(": "(", ")": ")"}
    python = " ".join(words.get(token) or str(" ".join(token.split()) in ALLOWED) for token in tokens)
    try:
        return bool(eval(python or "False", {"__builtins__": {}}))
    except (SyntaxError, TypeError):
        return False


def yanked(name, version):
    """True or False as the index says, None if cargo has no copy of this crate's entry."""
    folder = {1: "1", 2: "2", 3: f"3/{name[:1]}"}.get(len(name), f"{name[:2]}/{name[2:4]}").lower()
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    for entry in home.glob(f"registry/index/*/.cache/{folder}/{name.lower()}"):
        for release in re.findall(rb"\{[^\0\n]*\}", entry.read_bytes()):
            release = json.loads(release)
            if release["vers"] == version:
                return release["yanked"]
    return None


def main():
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    members = set(packages["workspace_members"])
    problems, unknown, foreign = [], 0, [p for p in packages["packages"] if p["id"] not in members]
    for package in foreign:
        name = f"{package['name']} {package['version']}"
        if not (package["source"] or "").startswith(("registry+", "sparse+")):
            problems.append(f"{name}: comes from {package['source'] or package['manifest_path']}, not from a registry")
        elif (state := yanked(package["name"], package["version"])) is None:
            unknown += 1
        elif state:
            problems.append(f"{name}: yanked")
        if not allowed(package["license"]):
            problems.append(f"{name}: licence {package['license']}")
    print(f"{len(foreign)} dependencies looked at, {len(problems)} problems, {unknown} without an index entry")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
