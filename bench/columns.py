"""Texts and several columns: what they take against jobs of one column, against a script, against one row a request; and
whether each value is the right one, whatever goes wrong."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cases import LATENCY, PYTHON, Goal
from fields import DISTINCT, FIELDS, TEXT_INSTRUCTION, TWO_DATES, definitions, lacks, long_ticket, value, words
from lab import GATEWAY, JOB, ROOT, Cluster, Provider, Watch, quoted
from special import Result, job_seconds
from tickets import INSTRUCTION, ticket

TYPES = {"team": "text", "mood": "text", "amount": "numeric", "order_date": "date", "due_date": "date"}
PACK = 50  # what the extension picks by itself
MAX_WORDS = 50  # the fake provider writes half as many to all: 40 tokens in the mean
# As in the tests: what passes when a row is asked again, and what happens to the values of a row.
PASSING = ["Http500", "Http503", "RateLimit429", "ResetBefore", "ResetAfter", "MalformedJson", "DropId", "InventId", "DoubleId",
           "UnknownCode", "EmptyAnswer", "CutByLength", "Prose"]
OF_FIELDS = ["SwapFields", "DropField", "DoubleField", "RenameField"]


class Table:
    """A table of tickets in a cluster, with empty columns and what is right in each."""

    def __init__(self, cluster: Cluster, rows: int, columns: dict[str, str], right: Callable[[str, int], str | None],
                 text: Callable[[int], str] = ticket) -> None:
        self.cluster, self.rows, self.columns = cluster, rows, columns
        empty = "".join(f", {name} {of}" for name, of in columns.items())
        want = "".join(f", want_{name} {of}" for name, of in columns.items())
        cluster.sql(f"CREATE TABLE mail (id bigint PRIMARY KEY, body text NOT NULL{want}{empty})")
        values = lambda n: "\t".join(right(name, n) or "\\N" for name in columns)  # noqa: E731
        lines = (f"{n}\t{text(n)}\t{values(n)}\n" for n in range(1, rows + 1))
        cluster.sql(f"COPY mail (id, body, {', '.join(f'want_{name}' for name in columns)}) FROM STDIN", stdin=lines)
        cluster.sql("VACUUM ANALYZE mail")
        cluster.sql("CHECKPOINT")

    def fill(self, task: str, columns: list[str], most_seconds: float = 1200, field: str | None = None,
             options: dict | None = None) -> tuple[int, str | None]:
        """Fills columns by a job from fields of their names, or from this one; its id, and what was wrong if it was not done in time."""
        names = json.dumps({name: field or name for name in columns})
        job = int(self.cluster.sql(f"SELECT llm_batch.backfill('mail', input => 'body', targets => '{names}'::jsonb, task => '{task}', "
                                   f"options => {quoted(json.dumps(options or {}))}::jsonb)"))
        try:
            self.cluster.wait(job, most_seconds)
        except RuntimeError as error:
            self.cluster.sql(f"SELECT llm_batch.cancel({job})")
            return job, str(error).splitlines()[0]
        return job, None

    def faults(self) -> dict[str, int]:
        """Rows by what is wrong with them: a value that is another, one in a neighbour's column, some values of a row
        alone, none of them although there are some."""
        def count(condition: str) -> int:
            return int(self.cluster.sql(f"SELECT count(*) FROM mail WHERE {condition}"))

        some = [f"({name} IS NOT NULL)" for name in self.columns]
        wanted = [f"(want_{name} IS NOT NULL)" for name in self.columns]
        others = [f"({a} = want_{b} AND {a} IS DISTINCT FROM want_{a})" for a, of in self.columns.items()
                  for b, other in self.columns.items() if a != b and of == other]
        wrong = [f"({name} <> want_{name} OR ({name} IS NOT NULL AND want_{name} IS NULL))" for name in self.columns]
        missing = [f"({name} IS NULL AND want_{name} IS NOT NULL)" for name in self.columns]
        return {"wrong": count(" OR ".join(wrong)), "neighbours": count(" OR ".join(others) or "false"),
                "half_written": count(f"({' OR '.join(missing)}) AND ({' OR '.join(some)})"),
                "lost": count(f"({' OR '.join(missing)}) AND NOT ({' OR '.join(some)}) AND ({' OR '.join(wanted)})")}

    def empty(self) -> None:
        self.cluster.sql(f"UPDATE mail SET {', '.join(f'{name} = NULL' for name in self.columns)}")
        self.cluster.sql("VACUUM ANALYZE mail")


def extractor(cluster: Cluster, name: str, fields: list[str], pack: int | None = None) -> None:
    options = {} if pack is None else {"max_rows_per_request": pack}
    cluster.sql(f"SELECT llm_batch.create_extractor('{name}', {quoted(definitions(fields))}::json, model => 'fake', "
                f"instruction => {quoted(INSTRUCTION)}, options => {quoted(json.dumps(options))}::jsonb)")


def generator(cluster: Cluster, name: str, options: dict) -> None:
    cluster.sql(f"SELECT llm_batch.create_generator('{name}', {quoted(TEXT_INSTRUCTION)}, model => 'fake', "
                f"options => {quoted(json.dumps(options))}::jsonb)")


def spent(provider: Provider) -> dict:
    stats = provider.stats()
    return {"tokens": stats["prompt_tokens"] + stats["completion_tokens"], "requests": stats["requests"],
            "asked_again": stats["rows_asked_again"]}


def bad(faults: dict[str, int]) -> Goal:
    return Goal("rows lost, wrong, half-written or in a neighbour's column", sum(faults.values()), most=0)


def one_pass(rows: int = 10_000) -> Result:
    """Four columns in one pass, against four jobs of one column, with classifiers where a column has labels."""
    columns = {name: TYPES[name] for name in DISTINCT}
    with Provider([]) as provider, Cluster(provider, PACK, None) as cluster:
        table = Table(cluster, rows, columns, value)
        extractor(cluster, "all", DISTINCT)
        table.fill("all", DISTINCT)
        at_once, faults = spent(provider), table.faults()
        table.empty()
        provider.reset()
        for name in DISTINCT:
            if "labels" in FIELDS[name]:
                cluster.sql(f"SELECT llm_batch.create_classifier('{name}', {quoted(json.dumps(FIELDS[name]['labels']))}::json, "
                            f"model => 'fake', instruction => {quoted(INSTRUCTION)})")
                table.fill(name, [name], field="label")
            else:
                extractor(cluster, name, [name])
                table.fill(name, [name])
        apart = spent(provider)
    result = {"rows": rows, "tokens_per_row": at_once["tokens"] / rows, "tokens_per_row_apart": apart["tokens"] / rows,
              "at_once": at_once, "apart": apart, "faults": faults}
    return result, [Goal("tokens / of four jobs", at_once["tokens"] / apart["tokens"], most=0.35),
                    Goal("requests / of four jobs", at_once["requests"] / apart["requests"], most=0.3), bad(faults)]


def objects(rows: int = 10_000) -> Result:
    """Four columns, two of them dates, against a script that asks for compact objects with the fields' names, 20 rows a
    request."""
    columns = {name: TYPES[name] for name in TWO_DATES}
    packs = {"20": 20, "by itself": None}
    tokens: dict[str, float] = {}
    faults: dict[str, dict[str, int]] = {}
    for name, pack in packs.items():
        with Provider([]) as provider, Cluster(provider, PACK, None) as cluster:
            table = Table(cluster, rows, columns, value)
            extractor(cluster, "all", TWO_DATES, pack)
            table.fill("all", TWO_DATES)
            tokens[name], faults[name] = spent(provider)["tokens"] / rows, table.faults()
    with Provider([]) as provider:
        wrong = _script(provider, rows)
        script = spent(provider)["tokens"] / rows
    result = {"rows": rows, "tokens_per_row": tokens, "tokens_per_row_script": script, "wrong_script": wrong, "faults": faults}
    return result, [Goal("tokens a row / of the script, 20 rows a request", tokens["20"] / script, most=0.9),
                    Goal("tokens a row / of the script, pack by itself", tokens["by itself"] / script, most=0.75),
                    bad({name: sum(of.values()) for name, of in faults.items()})]


def _script(provider: Provider, rows: int) -> int:
    """Asks by the script; rows that it has not or wrong."""
    with tempfile.TemporaryDirectory() as folder:
        texts, answers = Path(folder, "rows"), Path(folder, "answers")
        with texts.open("w") as file:
            file.writelines(json.dumps([n, ticket(n)]) + "\n" for n in range(1, rows + 1))
        subprocess.run([PYTHON, "tuned.py", provider.base_url, texts, answers, "--objects", "--rows-per-request=20",
                        "--tokens=1000000000", "--window=60"], cwd=ROOT / "bench", stdin=subprocess.DEVNULL, check=True)
        found = dict(line.rstrip("\n").split("\t") for line in answers.open())
    right = lambda n: {name: value(name, n) for name in TWO_DATES}  # noqa: E731
    given = lambda text: {name: f"{v}" for name, v in json.loads(text).items()}  # noqa: E731
    return sum(str(n) not in found or given(found[str(n)]) != right(n) for n in range(1, rows + 1))


def _text(_: str, number: int) -> str:
    return words(number, MAX_WORDS // 2, MAX_WORDS)


def texts(rows: int = 4_500) -> Result:
    """A text of 40 tokens from texts of 200, with 300 tokens of instructions, under a limit of 60 s; and one row a request,
    without one."""
    per_minute = 500_000
    limit = [*LATENCY, "--window", "60", "--tokens-per-window", str(per_minute)]
    column = {"note": "text"}
    with Provider(limit) as provider, Cluster(provider, PACK, per_minute) as cluster:
        table = Table(cluster, rows, column, _text, long_ticket)
        generator(cluster, "note", {"max_words": MAX_WORDS})
        job = int(cluster.sql("SELECT llm_batch.backfill('mail', input => 'body', target => 'note', task => 'note')"))
        cluster.wait(job, 900)
        stats, faults = provider.stats(), table.faults()
    alone_rows = 500
    with Provider([]) as provider, Cluster(provider, PACK, None) as cluster:
        table = Table(cluster, alone_rows, column, _text, long_ticket)
        generator(cluster, "note", {"max_words": MAX_WORDS, "max_rows_per_request": 1})
        cluster.wait(int(cluster.sql("SELECT llm_batch.backfill('mail', input => 'body', target => 'note', task => 'note')")), 300)
        alone = spent(provider)["tokens"] / alone_rows
        faults = {name: n + table.faults()[name] for name, n in faults.items()}
    per_row = (stats["prompt_tokens"] + stats["completion_tokens"]) / rows
    again = 100 * stats["rows_asked_again"] / rows
    refused = stats["by_status"].get("429", 0)
    result = {"rows": rows, "tokens_per_row": per_row, "tokens_per_row_alone": alone, "used": stats["window_used"],
              "answer_tokens_per_row": stats["completion_tokens"] / rows, "requests": stats["requests"], "429s": refused,
              "rows_cut_percent": again, "peak_window_tokens": stats["peak_window_tokens"], "faults": faults, "load": os.getloadavg()[0]}
    return result, [Goal("tokens a row / of one row a request", per_row / alone, most=0.55),
                    Goal("used", stats["window_used"], least=0.97), Goal("429s", refused, most=0),
                    Goal("rows cut, %", again, most=0.5), bad(faults)]


def texts_throughput(rows: int = 100_000) -> Result:
    """Texts from an endpoint without limits and latency."""
    memory: list[dict] = []
    with Provider([]) as provider, Cluster(provider, PACK, None) as cluster:
        small_cache(cluster)
        table = Table(cluster, rows, {"note": "text"}, _text)
        generator(cluster, "note", {"max_words": MAX_WORDS})
        with Watch(0.5, lambda: memory.append(_memory(cluster))):
            job = int(cluster.sql("SELECT llm_batch.backfill('mail', input => 'body', target => 'note', task => 'note')"))
            cluster.wait(job, 1200)
        faults, seconds = table.faults(), job_seconds(cluster, job)
    result = {"rows": rows, "seconds": seconds, "rows_per_second": rows / seconds, "faults": faults, "load": os.getloadavg()[0]}
    return result, [Goal("rows/s", rows / seconds, least=5_000), bad(faults), *flat(memory)]


def faults(rows: int = 10_000, share: float = 0.02) -> Result:
    """Each of the faults that pass, and of those of fields, in 2 % of the requests; two of the four columns have one type."""
    columns = {name: TYPES[name] for name in TWO_DATES}
    kinds = [*PASSING, *OF_FIELDS]
    options = [x for kind in kinds for x in ("--fault", f"{kind}={share}")]
    with Provider(options) as provider, Cluster(provider, PACK, None) as cluster:
        table = Table(cluster, rows, columns, value)
        extractor(cluster, "all", TWO_DATES)
        began = time.monotonic()
        job, error = table.fill("all", TWO_DATES)
        stats, found, progress = provider.stats(), table.faults(), cluster.progress(job)
        seconds = time.monotonic() - began
    result = {"rows": rows, "seconds": seconds, "error": error, "faults_of_requests": stats["faults"], "requests": stats["requests"],
              "rows_asked_again": stats["rows_asked_again"], "found": found, "progress": progress}
    goals = [Goal(f"rows {name.replace('_', '-')}", n, most=0) for name, n in found.items()]
    return result, [*goals, Goal("kinds of faults that happened", len(stats["faults"]), least=len(kinds))]


def nulls(rows: int = 100_000) -> Result:
    """A job of which 70 % of the rows have NULL as the answer in one of four columns, and the same without NULLs."""
    columns = {name: TYPES[name] for name in TWO_DATES}
    seconds: dict[str, float] = {}
    again: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    memory: list[dict] = []

    def text(number: int, word: str) -> str:
        return ticket(number) + (f" There is {word} {name}." if (name := lacks(number)) else "")

    kinds: dict[str, tuple[Callable[[int], str], Callable[[str, int], str | None]]] = {
        "without": (lambda n: text(n, "a"), value),
        "with": (lambda n: text(n, "no"),
                 lambda name, n: None if name == lacks(n) else value(name, n)),
    }
    for kind, (text_of, right) in kinds.items():
        with Provider([]) as provider, Cluster(provider, PACK, None) as cluster:
            table = Table(cluster, rows, columns, right, text_of)
            small_cache(cluster)
            extractor(cluster, "all", TWO_DATES)
            watch = memory if kind == "with" else []
            with Watch(0.5, lambda: watch.append(_memory(cluster))):
                job, error = table.fill("all", TWO_DATES, 7200)
            if error:
                raise RuntimeError(error)
            seconds[kind], again[kind], found[kind] = job_seconds(cluster, job), spent(provider)["asked_again"], table.faults()
            if kind == "with":
                second = _by_second_job(provider, table)
    result = {"rows": rows, "seconds": seconds, "asked_again": again, "asked_by_second_job": second, "faults": found,
              "load": os.getloadavg()[0]}
    return result, [Goal("rows asked again", sum(again.values()), most=0), bad(found["with"]),
                    Goal("rows asked by a second job with a provenance column", second, most=0),
                    Goal("time / without NULLs", seconds["with"] / seconds["without"], most=1.3), *flat(memory)]


def _by_second_job(provider: Provider, table: Table) -> int:
    """Rows that a job asks after another one, where rows say who answered them; none has its answer from the gateway."""
    table.empty()
    table.cluster.sql("ALTER TABLE mail ADD by jsonb")
    for _ in ("first", "second"):
        provider.reset()
        _, error = table.fill("all", TWO_DATES, 7200, options={"provenance_column": "by", "reuse": False})
        if error:
            raise RuntimeError(error)
    return provider.stats()["rows_asked"]


def _memory(cluster: Cluster) -> dict:
    found = {kind: cluster.memory(kind) for kind in (GATEWAY, JOB)}
    return {kind: memory.anonymous for kind, memory in found.items() if memory}


def small_cache(cluster: Cluster) -> None:
    """The gateway's answers are full long before the middle: else what is seen of its memory is how they fill."""
    cluster.sql("ALTER SYSTEM SET llm_batch.gateway_cache = '2MB'")
    cluster.sql("SELECT pg_reload_conf()")


def flat(memory: list[dict]) -> list[Goal]:
    """By how much processes grew from the middle of a job to its end."""
    goals = []
    for kind in (GATEWAY, JOB):
        seen = [sample[kind] for sample in memory if JOB in sample and kind in sample]
        fifth, tenth = seen[len(seen) * 4 // 10:len(seen) // 2], seen[len(seen) * 9 // 10:]
        grown = max(tenth) - max(fifth) if fifth and tenth else None
        goals.append(Goal(f"MiB that {kind} grew by from half to end", grown, most=4))
    return goals
