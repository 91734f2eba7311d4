"""Routes: do the limits of several keys add up, what do rows cost where models have different prices, and how long is nobody
answered when the first model goes down?"""

import contextlib
import os
import time
from collections.abc import Callable

from cases import LATENCY, Goal
from lab import Cluster, Door, Provider, Session, Watch
from special import Result, rate

# Tokens a minute, and the provider's window in seconds. Together they take 1,300 rows in flight: of one job there are at most 2,000.
KEYS, KEYS_WINDOW = [240_000, 480_000, 960_000], 12
ROW_TOKENS = 53  # about, 50 rows a request
# Models by price: dollars a million tokens of prompts and of answers, tokens a minute.
MEMBERS = {"cheap": (0.1, 0.4, 240_000), "middle": (0.3, 1.2, 240_000), "dear": (1.0, 4.0, 480_000)}
# The first model goes down so many seconds after the job's start, and comes back so many later.
DOWN_AFTER, BACK_AFTER = 10, 10
FAILOVER_PACK, FAILOVER_TOKENS, FAILOVER_WINDOW, FAILOVER_ROWS = 20, 500_000, 6, 7_000


def _limit(tokens_per_minute: int, window: int) -> list[str]:
    return [*LATENCY, "--window", str(window), "--tokens-per-window", str(tokens_per_minute * window // 60)]


def routes(minutes: float = 1.0) -> Result:
    """All of it; minutes: how long the keys are used."""
    result, goals = {}, []
    for name, (found, wanted) in {"spread": spread(minutes), "cheapest": cheapest(minutes, has_deadline=False),
                                  "cheapest, deadline": cheapest(minutes, has_deadline=True), **{f"failover, {way}": failover(way) for way in WAYS}}.items():
        result[name] = found
        goals += [Goal(f"{name}: {goal.what}", goal.value, goal.least, goal.most) for goal in wanted]
    return result | {"load": os.getloadavg()[0]}, goals


def spread(minutes: float) -> Result:
    """Three keys, the second with twice the limit of the first, the third with four times."""
    rows = int(sum(KEYS) / ROW_TOKENS * minutes)
    samples: list[dict] = []
    with contextlib.ExitStack() as stack:
        providers = [stack.enter_context(Provider(_limit(tokens, KEYS_WINDOW))) for tokens in KEYS]
        cluster = stack.enter_context(Cluster(providers[0], 50, None))
        for n, (provider, tokens) in enumerate(zip(providers, KEYS), 1):
            cluster.model(f"key{n}", provider.base_url, tokens_per_minute=tokens)
        _route(cluster, ["key1", "key2", "key3"], "spread")
        cluster.fill(rows)
        with _progress(cluster, samples):
            job = cluster.backfill()
            cluster.wait(job, 300 * minutes + 60)
        lost, wrong = cluster.lost_and_wrong()
        stats = [provider.stats() for provider in providers]
    tokens = sum(s["prompt_tokens"] + s["completion_tokens"] for s in stats)
    # Without the beginning, when nothing was answered yet, and the end.
    per_minute = (rate(samples, 0.15 * rows, 0.85 * rows) or 0) * 60
    of_sum = per_minute / (sum(KEYS) / (tokens / rows))
    used = [s["window_used"] for s in stats]
    refused = sum(s["by_status"].get("429", 0) for s in stats)
    result = {"rows": rows, "lost": lost, "wrong": wrong, "used": used, "refused": refused, "tokens_per_row": tokens / rows,
              "rows_per_minute": per_minute, "rows_asked": [s["rows_asked"] for s in stats]}
    return result, [Goal("rows lost or wrong", lost + wrong, most=0), Goal("used, least of the keys", min(used), least=0.96),
                    Goal("rows/min / of all limits", of_sum, least=0.96), Goal("429s", refused, most=0)]


def cheapest(minutes: float, has_deadline: bool) -> Result:
    """Three models of different prices. Without a deadline the cheap one is asked alone; with one all are, each to its limit."""
    tokens_per_minute = [tokens for *_, tokens in MEMBERS.values()]
    rows = int((sum(tokens_per_minute) if has_deadline else tokens_per_minute[0]) / ROW_TOKENS * minutes)
    with contextlib.ExitStack() as stack:
        providers = [stack.enter_context(Provider(_limit(tokens, KEYS_WINDOW))) for tokens in tokens_per_minute]
        cluster = stack.enter_context(Cluster(providers[0], 50, None))
        for provider, (name, (input_price, output_price, tokens)) in zip(providers, MEMBERS.items()):
            cluster.model(name, provider.base_url, tokens_per_minute=tokens, input_price=input_price, output_price=output_price)
        _route(cluster, list(MEMBERS), "cheapest")
        cluster.fill(rows)
        began = time.monotonic()
        job = cluster.backfill(**({"deadline": "1 hour"} if has_deadline else {}))
        cluster.wait(job, 300 * minutes + 60)
        seconds = time.monotonic() - began
        lost, wrong = cluster.lost_and_wrong()
        dollars = float(cluster.progress(job)["cost"])
        stats = [provider.stats() for provider in providers]
    asked = [s["rows_asked"] for s in stats]
    used = [s["window_used"] for s in stats]
    prompt, answer = (sum(s[kind] for s in stats) / rows for kind in ("prompt_tokens", "completion_tokens"))
    # Without a deadline the cheap one does all; with one each has as much of the rows as of the limits, which is the fastest.
    shares = [tokens / sum(tokens_per_minute) for tokens in tokens_per_minute] if has_deadline else [1.0, 0.0, 0.0]
    optimum = sum(rows * share * (prompt * input_price + answer * output_price) / 1_000_000
                  for share, (input_price, output_price, _) in zip(shares, MEMBERS.values()))
    result = {"rows": rows, "lost": lost, "wrong": wrong, "seconds": seconds, "rows_asked": asked, "used": used,
              "dollars": dollars, "optimum": optimum, "tokens_per_row": prompt + answer}
    dearer = sum(asked[1:]) / sum(asked)
    goals = [Goal("rows lost or wrong", lost + wrong, most=0), Goal("dollars / optimum", dollars / optimum, most=1.05)]
    if has_deadline:
        return result, [*goals, Goal("rows by dearer models", dearer, most=round(sum(shares[1:]) * 1.05, 3)),
                        Goal("used, least of the models", min(used), least=0.96)]
    return result, [*goals, Goal("rows by dearer models", dearer, most=0.01), Goal("used, the cheap one", used[0], least=0.96)]


# How the first model goes down, and how it comes back.
WAYS: dict[str, tuple[Callable[[Door, Provider], None], Callable[[Door, Provider], None]]] = {
    "refuses": (lambda door, _: door.shut(), lambda door, _: door.open()),
    "503": (lambda _, first: first.control(faults={"Http503": 1}), lambda _, first: first.control(faults={})),
    "silent": (lambda door, _: door.silence(), lambda door, _: door.open()),
}


def failover(way: str) -> Result:
    """Two models; the first goes down in the middle of a job and comes back."""
    down, back = WAYS[way]
    answers: list[tuple[float, int]] = []
    samples: list[dict] = []
    limit = _limit(FAILOVER_TOKENS, FAILOVER_WINDOW)
    with Provider(limit) as first, Provider(limit) as second, Door(first) as door, \
            Cluster(door, FAILOVER_PACK, FAILOVER_TOKENS) as cluster:
        cluster.model("second", second.base_url, tokens_per_minute=FAILOVER_TOKENS)
        _route(cluster, ["fake", "second"], "failover")
        cluster.fill(FAILOVER_ROWS)

        def look() -> None:
            all_answers = sum(provider.totals()["by_status"].get("200", 0) for provider in (first, second))
            answers.append((time.monotonic(), all_answers))

        with Watch(0.05, look), _progress(cluster, samples):
            job = cluster.backfill()
            time.sleep(DOWN_AFTER)
            before = first.totals()
            went_down = time.monotonic()
            down(door, first)
            time.sleep(BACK_AFTER)
            first_asked = _rows_requests(first)
            came_back = time.monotonic()
            back(door, first)
            while _rows_requests(first) == first_asked and time.monotonic() < came_back + 60:
                time.sleep(0.05)
            back_after = time.monotonic() - came_back
            cluster.wait(job, 300)
        lost, wrong = cluster.lost_and_wrong()
        asked = first.asked() + second.asked()
    without = _longest([answer for answer in answers if went_down <= answer[0] <= came_back], went_down)
    without_rows = _longest([(s["at"], s["done"]) for s in samples if went_down <= s["at"] <= came_back], went_down)
    twice, slowest = sum(asked.values()) - len(asked), before["latency_ms_max"] / 1000
    result = {"rows": FAILOVER_ROWS, "lost": lost, "wrong": wrong, "seconds_without_an_answer": without,
              "seconds_without_a_row_written": without_rows, "slowest_answer_seconds": slowest, "rows_asked_twice": twice,
              "rows_in_flight": before["rows_in_flight"], "most_rows_in_flight": before["peak_rows_in_flight"],
              "back_after_seconds": back_after}
    return result, [Goal("rows lost or wrong", lost + wrong, most=0),
                    Goal("seconds without an answer", without, most=round(2 * slowest + 3, 2) if way == "silent" else 3),
                    Goal("rows asked twice, with most rows in flight", twice, most=before["peak_rows_in_flight"]),
                    Goal("seconds until the first is asked again", back_after, most=30)]


def _route(cluster: Cluster, models: list[str], policy: str) -> None:
    names = ", ".join(f"'{model}'" for model in models)
    cluster.sql(f"SELECT llm_batch.create_route('bulk', ARRAY[{names}], policy => '{policy}')")
    cluster.sql("SELECT llm_batch.alter_classifier('topic', model => 'bulk')")


@contextlib.contextmanager
def _progress(cluster: Cluster, samples: list[dict]):
    """Looks at how many rows are written."""
    session = Session(cluster)

    def look() -> None:
        done = int(session.ask("SELECT coalesce(max(rows_done), 0) FROM llm_batch.progress"))
        samples.append({"at": time.monotonic(), "done": done})

    with Watch(0.05, look):
        yield
    session.close()


def _rows_requests(provider: Provider) -> int:
    """Requests with rows, without those that only ask whether it is there."""
    totals = provider.totals()
    return totals["admitted"] - totals["probes"]


def _longest(counts: list[tuple[float, int]], begin: float) -> float | None:
    """The longest time in which a count did not rise."""
    longest, last, before = 0.0, begin, counts[0][1] if counts else 0
    for at, count in counts:
        if count > before:
            longest, last, before = max(longest, at - last), at, count
    return max(longest, counts[-1][0] - last) if counts else None
