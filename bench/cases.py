"""Cases: one client fills the tickets under one kind of limit. What is measured of each, and what is wanted."""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import GATEWAY, ROOT, Cluster, CpuByKind, Memory, Provider, Watch
from tickets import label, ticket

PYTHON = ROOT / ".cache/bench-venv/bin/python"
LATENCY = ["--base-ms", "300", "--per-token-ms", "8", "--spread", "0.25"]
# For estimates of time alone: what a request takes besides its rows, and a row, in tokens.
FIXED_TOKENS, ROW_TOKENS = 463, 43.5


@dataclass(frozen=True)
class Case:
    client: str  # extension, naive, asyncio
    pack: int  # rows a request
    rows: int
    window: int = 6  # seconds
    limiter: str = "rolling"
    other: float = 0  # share of the limit that another client takes
    headers: str = "openai"
    retry_after: str = "both"
    tokens_per_minute: int = 500_000

    @property
    def tokens_per_window(self) -> int:
        return self.tokens_per_minute * self.window // 60

    @property
    def name(self) -> str:
        special = [self.limiter] * (self.limiter != "rolling")
        special += [f"other client {self.other:.0%}"] * (self.other > 0)
        special += ["no headers"] * (self.headers == "none") + ["no retry-after"] * (self.retry_after == "none")
        return ", ".join([f"{self.client} {self.pack}", f"{self.window} s", *special])

    @property
    def seconds(self) -> float:
        """About how long it will take; the start and the end of a case take some seconds."""
        tokens = self.rows * (FIXED_TOKENS / self.pack + ROW_TOKENS)
        return tokens / (self.tokens_per_minute / 60 * (1 - self.other) * 0.93) + 8

    def provider_options(self) -> list[str]:
        options = [*LATENCY, "--window", str(self.window), "--tokens-per-window", str(self.tokens_per_window)]
        if self.limiter != "rolling":
            options += ["--limiter", self.limiter]
        if self.other:
            options += ["--other-client", str(self.other)]
        if self.headers != "openai":
            options += ["--rate-headers", self.headers]
        if self.retry_after != "both":
            options += ["--retry-after", self.retry_after]
        return options


@dataclass(frozen=True)
class Goal:
    what: str
    value: float | None  # None: not measured
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        value = self.value
        return value is not None and (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        wanted = f">= {self.least:g}" if self.most is None else f"<= {self.most:g}"
        value = "-" if self.value is None else f"{self.value:.4g}" if abs(self.value) < 1000 else f"{self.value:.0f}"
        return f"{self.what} {value} ({wanted}: {'met' if self.met else 'not measured' if self.value is None else 'NOT MET'})"


def run(case: Case) -> dict:
    """Runs a case; its raw numbers and what follows from them."""
    with Provider(case.provider_options()) as provider:
        raw = (_extension if case.client == "extension" else _script)(case, provider)
        raw |= {"provider": provider.stats(), "load": os.getloadavg()[0]}
    return {"case": asdict(case) | {"name": case.name}, "raw": raw, "figures": figures(case, raw)}


class Early:
    """What the provider had counted after 5 s: so long a client may take to find out about another one."""

    def __init__(self, provider: Provider) -> None:
        self.stats: dict = {}
        self.timer = threading.Timer(5, lambda: self.stats.update(provider.totals()))

    def __enter__(self) -> dict:
        self.timer.start()
        return self.stats

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()


def _wait(cluster: Cluster, job: int, most_seconds: float) -> str | None:
    """Waits for the job; what is wrong if it does not get done. Its rows are lost then, and the rest is told all the same."""
    try:
        cluster.wait(job, most_seconds)
    except RuntimeError as error:
        cluster.sql(f"SELECT llm_batch.cancel({job})")
        return str(error).splitlines()[0]
    return None


def _extension(case: Case, provider: Provider) -> dict:
    peak: list[Memory] = []

    def look() -> None:
        cpu.look()
        if memory := cluster.memory(GATEWAY):
            peak[:] = [max([*peak, memory], key=lambda m: m.pss)]

    with Cluster(provider, case.pack, case.tokens_per_minute) as cluster:
        cluster.fill(case.rows)
        cpu = CpuByKind(cluster)
        began = time.monotonic()
        with Early(provider) as early, Watch(1, look):
            job = cluster.backfill()
            error = _wait(cluster, job, 3 * case.seconds + 60)
        seconds = time.monotonic() - began
        cpu_ms = cpu.result()
        lost, wrong = cluster.lost_and_wrong()
        return {"seconds": seconds, "error": error, "cpu_ms": sum(cpu_ms.values()), "cpu_ms_by_kind": cpu_ms, "lost": lost, "wrong": wrong,
                "progress": cluster.progress(job), "gateway_pss_mib": peak[0].pss, "gateway_private_mib": peak[0].private,
                "gateway_idle_pss_mib": cluster.gateway_idle.pss, "provider_after_5_s": early}


def _script(case: Case, provider: Provider) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        rows, answers = Path(folder, "rows"), Path(folder, "answers")
        with rows.open("w") as file:
            file.writelines(json.dumps([number, ticket(number)]) + "\n" for number in range(1, case.rows + 1))
        if case.client == "naive":
            command = ["naive.py", provider.base_url, rows, answers]
        else:
            command = ["tuned.py", provider.base_url, rows, answers, f"--rows-per-request={case.pack}",
                       f"--tokens={case.tokens_per_window}", f"--window={case.window}"]
        began = time.monotonic()
        process = subprocess.Popen([PYTHON, *command], cwd=ROOT / "bench", stdin=subprocess.DEVNULL)
        try:
            with Early(provider) as early:
                _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if process.returncode:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        labels = dict(line.rstrip("\n").split("\t") for line in answers.open())
        wrong = sum(label(int(number)) != found for number, found in labels.items())
        return {"seconds": seconds, "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1000, "lost": case.rows - len(labels),
                "wrong": wrong, "max_rss_mib": usage.ru_maxrss / 1024, "provider_after_5_s": early}


def figures(case: Case, raw: dict) -> dict:
    """What the table shows; None for what a client does not have."""
    stats, early = raw["provider"], raw["provider_after_5_s"]
    tokens = stats["prompt_tokens"] + stats["completion_tokens"]
    right = case.rows - raw["lost"] - raw["wrong"]
    per_row = tokens / max(right, 1)
    refused = stats["by_status"].get("429", 0)
    late_refused = refused - early.get("by_status", {}).get("429", 0)
    late_requests = stats["requests"] - early.get("requests", 0)
    # How many requests have to be under way to use all of the limit.
    needed = case.tokens_per_minute / 60 * stats["latency_ms_mean"] / 1000 / (tokens / stats["admitted"])
    return {
        "tokens_per_row": per_row,
        "used": stats["window_used"],
        "used_all": stats["window_used_all"],
        "peak_window_tokens": stats["peak_window_tokens"],
        "refused": refused,
        "refused_percent": 100 * refused / stats["requests"],
        "refused_percent_after_5_s": 100 * late_refused / max(late_requests, 1),
        "steady_rows_per_minute": stats["window_used"] * case.tokens_per_minute / per_row,
        "rows_in_flight_mean": stats["rows_in_flight_mean"],
        "rows_in_flight_peak": stats["peak_rows_in_flight"],
        # Of what is needed; where that is less than half a request, one counts as twice as much.
        "in_flight_multiple": 2 * stats["peak_in_flight"] / max(1, 2 * needed),
        "lost": raw["lost"],
        "wrong": raw["wrong"],
        "cpu_ms_per_row": raw["cpu_ms"] / max(right, 1),
        "gateway_pss_mib": raw.get("gateway_pss_mib"),
        "gateway_private_mib": raw.get("gateway_private_mib"),
        "gateway_idle_pss_mib": raw.get("gateway_idle_pss_mib"),
    }


def goals(result: dict, others: list[dict]) -> list[Goal]:
    """What is wanted of the extension in this case. `others`: the results so far."""
    case, f, raw = Case(**{k: v for k, v in result["case"].items() if k != "name"}), result["figures"], result["raw"]
    if case.client != "extension":
        return []
    plain = case.headers == "openai" and case.retry_after == "both" and not case.other
    used = 0.97 if case.window >= 60 else 0.945
    wanted = [Goal("rows lost or wrong", f["lost"] + f["wrong"], most=0)]
    if most := {20: 70, 50: 55, 100: 50.5}.get(case.pack):
        wanted.append(Goal("tokens/row", f["tokens_per_row"], most=most))
    if case.other and case.headers != "none":
        wanted += [Goal("used by both", f["used_all"], least=0.9),
                   Goal("429 % after 5 s", f["refused_percent_after_5_s"], most=2)]
    elif case.other:
        # Nothing but refusals tells of the other one.
        wanted.append(Goal("429 %", f["refused_percent"], most=1))
    else:
        wanted.append(Goal("used", f["used"], least=used))
        wanted.append(Goal("429s", f["refused"], most=0) if plain else Goal("429 %", f["refused_percent"], most=1))
        if case.limiter == "rolling":
            wanted.append(Goal("most tokens in a window", f["peak_window_tokens"], most=case.tokens_per_window))
    if plain and case.limiter == "rolling" and case.pack == 50:
        wanted += _against_others(case, f["steady_rows_per_minute"], others)
    if not case.other:
        # Beside another one the job takes twice as long, and what is done by the second counts double.
        wanted.append(Goal("CPU ms/row", f["cpu_ms_per_row"], most=0.1))
    wanted += [Goal("in flight, x rate x latency", f["in_flight_multiple"], most=2),
               Goal("gateway PSS MiB", f["gateway_pss_mib"], most=round(raw["gateway_idle_pss_mib"] + 50, 1))]
    return wanted


def _against_others(case: Case, steady: float, others: list[dict]) -> list[Goal]:
    def best(client: str) -> float | None:
        rates = [r["figures"]["steady_rows_per_minute"] for r in others
                 if r["case"]["client"] == client and r["case"]["window"] == case.window
                 and r["case"]["limiter"] == case.limiter and not r["case"]["other"]]
        return max(rates, default=None)

    wanted = [Goal("steady rows/min", steady, least=(8900 if case.window >= 60 else 8700) * case.tokens_per_minute // 500_000)]
    if naive := best("naive"):
        wanted.append(Goal("times naive", steady / naive, least=9))
    if tuned := best("asyncio"):
        wanted.append(Goal("times asyncio", steady / tuned, least=1))
    return wanted


def _number(digits: int = 0) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else f"{value:.{digits}f}"


COLUMNS: list[tuple[str, Callable[[dict], str]]] = [
    ("client", lambda r: r["case"]["client"]),
    ("rows a request", lambda r: str(r["case"]["pack"])),
    ("window", lambda r: f"{r['case']['window']} s"),
    ("limiter", lambda r: ", ".join(r["case"]["name"].split(", ")[2:]) or "rolling"),
    ("rows", lambda r: str(r["case"]["rows"])),
    *((title, lambda r, key=key, digits=digits: _number(digits)(r["figures"][key])) for title, key, digits in [
        ("tokens/row", "tokens_per_row", 2),
        ("used", "used", 3),
        ("used by all", "used_all", 3),
        ("429s", "refused", 0),
        ("429 %", "refused_percent", 2),
        ("429 % after 5 s", "refused_percent_after_5_s", 2),
        ("steady rows/min", "steady_rows_per_minute", 0),
        ("rows in flight, mean", "rows_in_flight_mean", 0),
        ("peak", "rows_in_flight_peak", 0),
        ("x rate x latency", "in_flight_multiple", 2),
        ("lost", "lost", 0),
        ("wrong", "wrong", 0),
        ("CPU ms/row", "cpu_ms_per_row", 3),
        ("gateway PSS MiB", "gateway_pss_mib", 1),
        ("of it private", "gateway_private_mib", 1),
        ("PSS idle", "gateway_idle_pss_mib", 1),
    ]),
]


def row(result: dict) -> list[str]:
    return [show(result) for _, show in COLUMNS]
