"""Measures the extension and what it is compared with, against the fake provider. See bench/README.md.

The results go to bench/results/, as JSON with all raw numbers and as a table.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import columns
import decisions
import dialects
import embeddings
import routes
import siege
import special
from cases import COLUMNS, Case, Goal, goals, row, run
from lab import ROOT, lib

RESULTS = ROOT / "bench/results"


def cases_of(size: str) -> list[Case]:
    """The scripts first, so that what is wanted of the extension in comparison can be said with its own row."""
    if size == "quick":
        return [Case("naive", 1, 300), Case("asyncio", 50, 2_500), Case("extension", 50, 2_500)]
    standard = [
        Case("naive", 1, 2_000),
        Case("asyncio", 20, 5_000),
        Case("asyncio", 50, 6_500),
        Case("extension", 20, 5_000),
        Case("extension", 50, 6_500),
        Case("extension", 100, 7_000),
        Case("extension", 50, 6_500, limiter="bucket"),
        Case("extension", 50, 4_500, headers="none", retry_after="none"),
        Case("extension", 50, 16_000, other=0.5),
        Case("extension", 50, 16_000, other=0.5, headers="none", retry_after="none"),
        Case("extension", 50, 24_000, window=60),
    ]
    if size == "standard":
        return standard
    return standard[:-1] + [
        Case("naive", 1, 3_000, window=60),
        Case("asyncio", 20, 18_000, window=60),
        Case("asyncio", 50, 24_000, window=60),
        Case("extension", 50, 24_000, window=60),
        Case("extension", 50, 24_000, window=60, limiter="bucket"),
        Case("extension", 50, 14_000, window=60, other=0.5),
        Case("extension", 50, 14_000, window=60, other=0.5, headers="none", retry_after="none"),
    ]


# Those of texts and columns that are measured with the standard set.
STANDARD = ["one-pass", "objects", "texts", "faults", "texts-throughput", "nulls"]
# What is in the file of numbers alone.
HIDDEN = ("samples", "lines")
WITH_ROWS = [*STANDARD, "throughput", "million", "embeddings", "decisions"]
WITH_MINUTES = ["dialects", "routes"]
# Name, seconds it takes, function.
SPECIALS: dict[str, tuple[float, Callable[..., special.Result]]] = {
    "one-pass": (30, columns.one_pass),
    "objects": (30, columns.objects),
    "texts": (170, columns.texts),
    "faults": (60, columns.faults),
    "throughput": (15, special.throughput),
    "texts-throughput": (30, columns.texts_throughput),
    "nulls": (60, columns.nulls),
    "nulls-million": (400, lambda: columns.nulls(1_000_000)),
    "million": (60, special.million),
    "dialects": (160, dialects.dialects),
    "decisions": (40, decisions.decisions),
    "routes": (420, routes.routes),
    "embeddings": (80, embeddings.embeddings),
    "barrier": (30, special.barrier),
    "sql": (60, special.sql),
    "burst": (320, lambda: special.burst(60)),
    "burst-6": (320, lambda: special.burst(6)),
    "interactive": (90, lambda: special.interactive(6)),
    "interactive-60": (260, lambda: special.interactive(60)),
    "siege": (330, siege.siege),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("what", nargs="*", default=["cases"], metavar="WHAT",
                        help=f"cases (default), one (a single case, see below), {', '.join(SPECIALS)}")
    parser.add_argument("--quick", action="store_true", help="three short cases, to see whether it runs")
    parser.add_argument("--full", action="store_true", help="more cases, and everything else")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is not met")
    parser.add_argument("--no-build", action="store_true", help="take the extension and the provider that are installed")
    parser.add_argument("--rows", type=int, help=f"rows of one, {', '.join(WITH_ROWS)}")
    parser.add_argument("--attack", default="", help="of siege: those in whose names this expression is found")
    parser.add_argument("--minutes", type=float, help=f"how long limits are used: {', '.join(WITH_MINUTES)}")
    parser.add_argument("--tokens-per-minute", type=int, default=500_000)
    one = parser.add_argument_group("one")
    one.add_argument("--client", choices=["extension", "naive", "asyncio"], default="extension")
    one.add_argument("--pack", type=int, default=50, help="rows a request")
    one.add_argument("--window", type=int, default=6, help="the provider's window in seconds")
    one.add_argument("--limiter", choices=["rolling", "bucket"], default="rolling")
    one.add_argument("--other", type=float, default=0, help="share of the limit that another client takes")
    one.add_argument("--headers", choices=["none", "openai", "anthropic", "mistral", "azure"], default="openai")
    one.add_argument("--retry-after", choices=["none", "seconds", "both", "date"], default="both")
    args = parser.parse_args()
    for what in args.what:
        if what not in ("cases", "one", *SPECIALS):
            parser.error(f"{what}: no such thing to measure")
    if args.what == ["cases"] and not args.quick:
        args.what = ["cases", *(SPECIALS if args.full else STANDARD)]
    return args


def machine() -> dict:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return {"cores": len(os.sched_getaffinity(0)), "cpu": cpu, "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
            "kernel": platform.release(), "load_before": os.getloadavg()[0], "postgres": lib('"$PG_CONFIG" --version').strip(),
            "python": platform.python_version()}


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()

    changed = "-changed" if git("status", "--porcelain") else ""
    return (git("rev-parse", "--short", "HEAD") or "none") + changed


class Report:
    """Prints while it is measured, writes the files."""

    def __init__(self) -> None:
        self.name = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + commit()
        self.result: dict = {"bench": self.name, "machine": machine(), "cases": [], "special": {}, "failed": {}}
        self.goals: list[tuple[str, Goal]] = []

    def add_case(self, case: Case) -> None:
        self._try(case.name, lambda: self._case(case))

    def _case(self, case: Case) -> list[Goal]:
        result = run(case)
        self.result["cases"].append(result)
        print("  " + "  ".join(f"{title} {shown}" for (title, _), shown in zip(COLUMNS, row(result))))
        if error := result["raw"].get("error"):
            print(f"  {error}")
        return goals(result, self.result["cases"])

    def add_special(self, name: str, measure: Callable[[], special.Result]) -> None:
        self._try(name, lambda: self._special(name, measure))

    def _special(self, name: str, measure: Callable[[], special.Result]) -> list[Goal]:
        result, wanted = measure()
        self.result["special"][name] = result
        for key, value in result.items():
            if key == "claim_plan":
                print("  claim_plan", *value, sep="\n    ")
            elif key == "table":
                print(*_table(value[0], value[1:], names=1), sep="\n")
            elif key not in HIDDEN:
                print(f"  {key} {json.dumps(_short(value))}")
        return wanted

    def _try(self, name: str, measure: Callable[[], list[Goal]]) -> None:
        print(f"\n{name}", flush=True)
        try:
            wanted = measure()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            self.result["failed"][name] = str(error)
            print(f"  failed: {error}", flush=True)
            return
        for goal in wanted:
            self.goals.append((name, goal))
            print(f"    {goal}", flush=True)

    def write(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        self.result["goals"] = [{"of": name, "what": goal.what, "value": goal.value, "least": goal.least, "most": goal.most,
                                 "met": goal.met} for name, goal in self.goals]
        path = RESULTS / self.name
        path.with_suffix(".json").write_text(json.dumps(self.result, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.table())
        return path

    def table(self) -> str:
        m = self.result["machine"]
        lines = [f"# {self.name}", "", f"{m['postgres']}, {m['cores']} cores ({m['cpu']}), load {m['load_before']:.1f} at the start.", ""]
        if self.result["cases"]:
            lines += _table([title for title, _ in COLUMNS], map(row, self.result["cases"]), names=5) + [""]
        for name, result in self.result["special"].items():
            lines += [f"**{name}**: " + ", ".join(f"{key} {json.dumps(_short(value))}" for key, value in result.items()
                                                 if key not in (*HIDDEN, "claim_plan", "table")), ""]
            if table := result.get("table"):
                lines += [*_table(table[0], table[1:], names=1), ""]
            if plan := result.get("claim_plan"):
                lines += ["```text", *plan, "```", ""]
        lines += [f"**{name}** failed: {error}\n" for name, error in self.result["failed"].items()]
        if self.goals:
            lines += _table(["of", "goal"], ([name, str(goal)] for name, goal in self.goals), names=2)
        return "\n".join(lines) + "\n"


def _table(titles: list[str], rows: object, names: int) -> list[str]:
    marks = ["---"] * names + ["---:"] * (len(titles) - names)
    return ["| " + " | ".join(cells) + " |" for cells in [titles, marks, *rows]]


def _short(value: object) -> object:
    """Numbers with as many digits as mean something."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_short(v) for v in value]
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return value


def main() -> int:
    args = arguments()
    # So that clusters and providers are taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cases: list[Case] = []
    if "cases" in args.what:
        cases = cases_of("quick" if args.quick else "full" if args.full else "standard")
    if "one" in args.what:
        cases.append(Case(args.client, args.pack if args.client != "naive" else 1, args.rows or 5_000, args.window, args.limiter,
                          args.other, args.headers, args.retry_after))
    cases = [Case(**{**vars(case), "tokens_per_minute": args.tokens_per_minute}) for case in cases]
    specials = {name: measure for name, measure in SPECIALS.items() if name in args.what}
    if "siege" in specials and args.attack:
        specials["siege"] = (60, lambda: siege.siege(args.attack))
    seconds = sum(case.seconds for case in cases) + sum(about for about, _ in specials.values())
    print(f"{len(cases) + len(specials)} to measure, about {max(seconds / 60, 0.1):.1f} minutes")

    report = Report()
    try:
        for case in cases:
            report.add_case(case)
        for name, (_, measure) in specials.items():
            size = args.rows if name in WITH_ROWS else args.minutes if name in WITH_MINUTES else None
            report.add_special(name, (lambda f=measure, size=size: f(size)) if size else measure)
    except BaseException:  # told to stop: what was measured is kept
        if report.result["cases"] or report.result["special"]:
            report.write()
        raise
    path = report.write()
    missed = [f"{name}: {goal}" for name, goal in report.goals if not goal.met]
    missed += [f"{name}: {error}" for name, error in report.result["failed"].items()]
    print(f"\n{report.table()}")
    print(f"{len(report.goals)} goals, {len(missed)} not met", *missed, sep="\n  ")
    print(f"written to {path.with_suffix('.json').relative_to(ROOT)} and .md")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
