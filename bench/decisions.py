"""Decisions against chats: what the rows of a job cost in each way, and where the cheaper way is to be found (`auto`)."""

import contextlib
import json
import os

from cases import Goal
from lab import Cluster, Provider, quoted
from special import Result
from tickets import INSTRUCTION, LABELS

PACK = 50
# Dollars per million tokens of prompts and of answers, where both ways have the same price for prompts.
INPUT, OUTPUT = 0.10, 0.50
WAYS = ["chat", "decisions", "auto"]
MORE = {f"subject {number}": "" for number in range(9, 31)}  # no ticket is about these


def _labels(count: int) -> dict[str, str]:
    return dict(list({**LABELS, **MORE}.items())[:count])


def decisions(rows: int = 4_000) -> Result:
    """Jobs with 2, 8 and 30 labels, in the three ways."""
    result: dict = {"load": os.getloadavg()[0]}
    goals: list[Goal] = []
    with contextlib.ExitStack() as stack:
        providers = {way: stack.enter_context(Provider([])) for way in WAYS}
        cluster = stack.enter_context(Cluster(providers["chat"], PACK, None))
        cluster.fill(5 * rows)
        for way, provider in providers.items():
            cluster.model(way, provider.base_url, input_price=INPUT, output_price=OUTPUT)
        for count in (2, 8, 30):
            found = {way: _run(cluster, provider, way, count, rows) for way, provider in providers.items()}
            least = min(found[way]["dollars"] for way in ("chat", "decisions"))
            found["auto_to_cheaper"] = found["auto"]["dollars"] / least
            result[f"{count} labels"] = found
            goals += [Goal(f"{count} labels: rows lost or wrong", sum(found[way]["lost"] for way in WAYS), most=0),
                      Goal(f"{count} labels: tokens written by decisions", found["decisions"]["output_tokens"], most=0),
                      Goal(f"{count} labels: dollars of auto / of the cheaper way", found["auto_to_cheaper"], most=1.03)]
    return result, goals


def _run(cluster: Cluster, provider: Provider, way: str, count: int, rows: int) -> dict:
    name, labels = f"{way}_{count}", _labels(count)
    options = json.dumps({"max_rows_per_request": PACK, "ask_by": way, "reuse": False})
    cluster.sql(f"SELECT llm_batch.create_classifier('{name}', {quoted(json.dumps(labels))}::json, '{way}', {quoted(INSTRUCTION)}, "
                f"options => '{options}')")
    cluster.sql(f"CREATE TABLE {name} (LIKE ticket INCLUDING ALL)")
    cluster.sql(f"INSERT INTO {name} SELECT * FROM ticket WHERE '{json.dumps(list(labels))}'::jsonb ? want ORDER BY id LIMIT {rows}")
    provider.reset()
    job = cluster.backfill(name, task=name)
    cluster.wait(job, 300)
    stats = provider.stats()
    said = cluster.progress(job)
    return {
        "lost": sum(cluster.lost_and_wrong(name)), "rows": said["rows_done"], "requests": stats["requests"],
        "input_tokens": stats["prompt_tokens"], "output_tokens": stats["completion_tokens"],
        "tokens_per_row": (stats["prompt_tokens"] + stats["completion_tokens"]) / said["rows_done"],
        "dollars": (stats["prompt_tokens"] * INPUT + stats["completion_tokens"] * OUTPUT) / 1e6,
    }
