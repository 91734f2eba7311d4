"""Each dialect at its own limits, through the fake provider that speaks it: is the limit used, without a refusal, and do the
rows take as many tokens as with OpenAI's?"""

import contextlib
import os
from dataclasses import dataclass, field

from cases import LATENCY, Goal
from lab import Cluster, Provider, Watch
from special import Result

WINDOW = 6  # seconds
PACK = 50  # what the extension picks by itself
# The provider's options by the model's settings.
OPTIONS = {
    "tokens_per_minute": "--tokens-per-window",
    "input_tokens_per_minute": "--input-tokens-per-window",
    "output_tokens_per_minute": "--output-tokens-per-window",
    "requests_per_minute": "--requests-per-window",
}


@dataclass(frozen=True)
class Dialect:
    api: str
    limits: dict[str, int]  # a minute, as create_model() takes them
    rows_per_minute: int  # about, of which the number of rows follows
    options: list[str] = field(default_factory=list)
    slots: int | None = None  # its only limit: so many requests at once

    def provider_options(self) -> list[str]:
        limits = [x for name, limit in self.limits.items() for x in (OPTIONS[name], str(limit * WINDOW // 60))]
        return [*LATENCY, "--window", str(WINDOW), *limits, *self.options]


# Each by what its provider counts: OpenAI and Mistral prompts and answers, Azure what is reserved, Anthropic prompts and
# answers apart, Gemini prompts, Cohere requests; Ollama answers as many at once as it has room for.
DIALECTS = [
    Dialect("openai", {"tokens_per_minute": 500_000, "requests_per_minute": 500}, 9_400),
    Dialect("azure", {"tokens_per_minute": 1_000_000}, 9_400, ["--reserve", "prompt-plus-max"]),
    Dialect("anthropic", {"input_tokens_per_minute": 500_000, "output_tokens_per_minute": 100_000, "requests_per_minute": 1_000}, 10_000),
    Dialect("gemini", {"input_tokens_per_minute": 500_000, "requests_per_minute": 1_000}, 10_000),
    Dialect("mistral", {"tokens_per_minute": 500_000, "requests_per_minute": 360}, 9_400),
    Dialect("cohere", {"requests_per_minute": 200}, 9_700),
    Dialect("ollama", {}, 5_000, slots=4),
]
# So many of them run at once: as many jobs as a cluster runs by itself.
AT_ONCE = 4


def dialects(minutes: float = 1.0) -> Result:
    """The table of them; each is held against OpenAI's."""
    result: dict = {}
    for first in range(0, len(DIALECTS), AT_ONCE):
        result |= _run(DIALECTS[first:first + AT_ONCE], minutes)
    openai = result["openai"]["tokens_per_row"]
    goals: list[Goal] = []
    for api, found in result.items():
        found["tokens_per_row_to_openai"] = found["tokens_per_row"] / openai
        goals += [Goal(f"{api}: rows lost or wrong", found["lost"] + found["wrong"], most=0),
                  Goal(f"{api}: used", found["used"], least=0.97),
                  Goal(f"{api}: 429s", found["refused"], most=0),
                  Goal(f"{api}: tokens a row / openai's", found["tokens_per_row_to_openai"], most=1.03)]
    return result | {"load": os.getloadavg()[0]}, goals


def _run(some: list[Dialect], minutes: float) -> dict:
    with contextlib.ExitStack() as stack:
        providers = {d.api: stack.enter_context(Provider(d.provider_options())) for d in some}
        cluster = stack.enter_context(Cluster(providers[some[0].api], PACK, None))
        rows = {d.api: int(d.rows_per_minute * minutes) for d in some}
        cluster.fill(max(rows.values()))
        for d in some:
            concurrent = {"max_concurrent_requests": d.slots} if d.slots else {}
            cluster.model(d.api, providers[d.api].bases[d.api], d.api, **d.limits, **concurrent)
            cluster.classifier(d.api, d.api, PACK)
            cluster.sql(f"CREATE TABLE of_{d.api} (LIKE ticket INCLUDING ALL)")
            cluster.sql(f"INSERT INTO of_{d.api} SELECT * FROM ticket WHERE id <= {rows[d.api]}")
            cluster.sql(f"VACUUM ANALYZE of_{d.api}")
        in_flight: dict[str, list[tuple[int, int]]] = {d.api: [] for d in some if d.slots}

        def look() -> None:
            for api, samples in in_flight.items():
                totals = providers[api].totals()
                samples.append((totals["admitted"], totals["in_flight"]))

        with Watch(0.05, look):
            jobs = {d.api: cluster.backfill(f"of_{d.api}", task=d.api) for d in some}
            for job in jobs.values():
                cluster.wait(job, 300 * minutes + 60)
        return {d.api: _figures(d, providers[d.api].stats(), rows[d.api], cluster.lost_and_wrong(f"of_{d.api}"),
                                in_flight.get(d.api, [])) for d in some}


def _figures(dialect: Dialect, stats: dict, rows: int, lost_and_wrong: tuple[int, int], in_flight: list[tuple[int, int]]) -> dict:
    lost, wrong = lost_and_wrong
    used = stats["window_used"]
    if dialect.slots:
        # Without the beginning, when it is found out how many go at once, and the end, when no rows are left.
        steady = [n for admitted, n in in_flight if 0.15 <= admitted / stats["admitted"] <= 0.85]
        used = sum(steady) / max(len(steady), 1) / dialect.slots
    return {
        "rows": rows, "lost": lost, "wrong": wrong, "used": used, "refused": stats["by_status"].get("429", 0),
        "tokens_per_row": (stats["prompt_tokens"] + stats["completion_tokens"]) / rows,
        "input_tokens_per_row": stats["prompt_tokens"] / rows, "requests": stats["requests"],
        "rows_per_minute": 60_000 * rows / (stats["last_answer_ms"] - stats["first_request_ms"]),
        "rows_asked_again": stats["rows_asked_again"],
    }
