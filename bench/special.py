"""What is not a question of the limit: throughput, a million rows, sessions that call at once, a session beside a job
or after a rest."""

import os
import statistics
import time

from cases import LATENCY, Goal
from lab import GATEWAY, JOB, Cluster, CpuByKind, Memory, Provider, Session, Watch
from tickets import ticket

TOKENS_PER_MINUTE = 500_000
Result = tuple[dict, list[Goal]]


def throughput(rows: int = 100_000) -> Result:
    """An endpoint without limits and latency: what does the extension itself manage?"""
    with Provider([]) as provider, Cluster(provider, 50, None) as cluster:
        cluster.fill(rows)
        cpu, provider_cpu = CpuByKind(cluster), provider.cpu_ms()
        with Watch(0.25, cpu.look):
            job = cluster.backfill()
            cluster.wait(job, 600)
        cpu_ms = cpu.result() | {"fake provider": provider.cpu_ms() - provider_cpu}
        lost, wrong = cluster.lost_and_wrong()
        seconds = job_seconds(cluster, job)
        result = {
            "rows": rows, "seconds": seconds, "rows_per_second": rows / seconds, "lost": lost, "wrong": wrong,
            "cpu_ms_per_row": {kind: ms / rows for kind, ms in sorted(cpu_ms.items(), key=lambda x: -x[1])},
            "synchronous_commit": cluster.sql("SHOW synchronous_commit"), "fsync": cluster.sql("SHOW fsync"),
            "load": os.getloadavg()[0],
        }
    return result, [Goal("rows lost or wrong", lost + wrong, most=0),
                    Goal("rows/s", rows / seconds, least=10_000)]


def million(rows: int = 1_000_000) -> Result:
    """A long job: does it get slower or larger? With an index on the target, which tempts the planner."""
    samples: list[dict] = []
    plan: list[str] = []

    with Provider([]) as provider, Cluster(provider, 50, None) as cluster:
        cluster.fill(rows)
        cluster.sql("CREATE INDEX ticket_topic ON ticket (topic)")
        cluster.sql("VACUUM ANALYZE ticket")
        session = Session(cluster)

        def look() -> None:
            done = session.ask("SELECT coalesce(max(rows_done), 0) FROM llm_batch.progress")
            sample = {"at": time.monotonic(), "done": int(done)}
            for kind in (GATEWAY, JOB):
                if memory := cluster.memory(kind):
                    sample[kind] = _memory(memory)
            samples.append(sample)
            if not plan and sample["done"] >= 0.9 * rows:
                plan.append(_claim_plan(cluster, sample["done"]))

        with Watch(0.5, look):
            job = cluster.backfill()
            cluster.wait(job, 3600)
        session.close()
        lost, wrong = cluster.lost_and_wrong()
        seconds = job_seconds(cluster, job)

    # Without the very beginning and end, where the job counts rows and waits for the last answers.
    first, last = rate(samples, 0.01 * rows, 0.1 * rows), rate(samples, 0.9 * rows, 0.99 * rows)
    memory = {kind: {f"{tenth}. tenth": _most(samples, kind, (tenth - 1) * rows / 10, tenth * rows / 10) for tenth in (1, 5, 10)}
              for kind in (GATEWAY, JOB)}
    claim = plan[0] if plan else ""
    on_key = "using ticket_pkey" in claim and "ticket_topic" not in claim and "Sort" not in claim
    result = {"rows": rows, "seconds": seconds, "lost": lost, "wrong": wrong, "rows_per_second": rows / seconds,
              "rows_per_second_first_tenth": first, "rows_per_second_last_tenth": last, "memory_mib": memory,
              "claim_plan": claim.splitlines(), "samples": samples, "load": os.getloadavg()[0]}
    goals = [Goal("rows lost or wrong", lost + wrong, most=0),
             Goal("last tenth's rate / first's", first and last and last / first, least=0.9),
             Goal("claim reads by the key's index", float(on_key), least=1)]
    for kind, tenths in memory.items():
        # Not from the first: the gateway keeps answers for texts that come again, up to llm_batch.gateway_cache.
        begin, end = tenths["5. tenth"], tenths["10. tenth"]
        grown = end["anonymous"] - begin["anonymous"] if begin and end else None
        goals.append(Goal(f"MiB that {kind} grew by from half to end", grown, most=4))
    return result, goals


def barrier(sessions: int = 50, rounds: int = 5) -> Result:
    """Sessions of one role that call llm_classify() at the same instant: how many requests is that?"""
    requests: list[int] = []
    took: list[float] = []
    with Provider(LATENCY) as provider, Cluster(provider, 50, None) as cluster:
        all_sessions = [Session(cluster) for _ in range(sessions)]
        for n, session in enumerate(all_sessions, 1):
            session.send(f"SELECT llm_classify('{_quoted(n)}', 'topic')")
        for session in all_sessions:
            session.line()
        for n in range(1, rounds + 1):
            before = provider.totals()["requests"]
            begin = time.time() + 1.5
            for place, session in enumerate(all_sessions, 1):
                text = _quoted(n * sessions + place)
                session.send(f"SELECT 'slept' FROM pg_sleep_until(to_timestamp({begin})); SELECT llm_classify('{text}', 'topic')")
            answers = [(session.line(), session.line())[1] for session in all_sessions]
            took.append(time.time() - begin)
            requests.append(provider.totals()["requests"] - before)
            if not all(answers):
                raise RuntimeError("a session got no label")
        for session in all_sessions:
            session.close()
    result = {"sessions": sessions, "requests": requests, "seconds": took, "load": os.getloadavg()[0]}
    return result, [Goal(f"requests of {sessions} sessions, round {n}", count, most=3) for n, count in enumerate(requests, 1)]


def sql(rows: int = 10_000, rounds: int = 5) -> Result:
    """An UPDATE with llm_classify() in it, by the plan node, and one with llm_classify_batch(): requests and time."""
    statements = {
        "llm_classify": "UPDATE ticket SET topic = llm_classify(body || ' {n}', 'topic')",
        "llm_classify_batch": "UPDATE ticket t SET topic = r.label FROM llm_classify_batch("
                              "'SELECT id, body || '' {n}'' FROM ticket', 'topic') r WHERE t.id = r.id::bigint",
    }
    took: dict[str, list[float]] = {name: [] for name in statements}
    requests: dict[str, list[int]] = {name: [] for name in statements}
    with Provider(LATENCY) as provider, Cluster(provider, 50, None) as cluster:
        cluster.fill(rows)
        cluster.sql("VACUUM ANALYZE ticket")
        session = Session(cluster)
        # The first round finds out how many requests may be under way; it does not count.
        for n in range(rounds + 1):
            for name, statement in statements.items():
                before, began = provider.totals()["requests"], time.monotonic()
                session.ask(f"BEGIN; {statement.format(n=f'{name} {n}')}; SELECT count(*) FROM ticket WHERE topic = want; ROLLBACK")
                if n > 0:
                    took[name].append(time.monotonic() - began)
                    requests[name].append(provider.totals()["requests"] - before)
        session.close()
    ratios = [a / b for a, b in zip(*took.values())]
    result = {"rows": rows, "seconds": took, "requests": requests, "ratios": ratios, "load": os.getloadavg()[0]}
    return result, [Goal("most requests of an UPDATE with llm_classify()", max(requests["llm_classify"]), most=rows // 50 + rows // 1000),
                    Goal("its time / with llm_classify_batch(), median", statistics.median(ratios), most=1.05)]


def burst(window: int, rounds: int = 3) -> Result:
    """A statement of 1,000 rows after more than a minute's rest: how much longer than its slowest request does it take?
    And one of 500 rows after a restart of the gateway."""
    limit = ["--window", str(window), "--tokens-per-window", str(TOKENS_PER_MINUTE * window // 60)]
    ratios: list[float] = []
    took: list[float] = []
    refused: list[int] = []
    gateway = f"SELECT pid FROM pg_stat_activity WHERE backend_type = '{GATEWAY}'"
    with Provider([*LATENCY, *limit]) as provider, Cluster(provider, 50, TOKENS_PER_MINUTE) as cluster:
        cluster.fill((rounds + 1) * 1_000 + 500)
        session = Session(cluster)

        def statement(first: int, rows: int) -> None:
            provider.reset()
            began = time.monotonic()
            query = f"SELECT id, body FROM ticket WHERE id BETWEEN {first} AND {first + rows - 1}"
            labels = session.ask(f"SELECT count(label) FROM llm_classify_batch('{query}', 'topic')")
            took.append(time.monotonic() - began)
            if int(labels) != rows:
                raise RuntimeError(f"{labels} of {rows} rows have a label")
            totals = provider.totals()
            ratios.append(took[-1] * 1000 / totals["latency_ms_max"])
            refused.append(totals["by_status"].get("429", 0))

        # What the model's answers are like is learnt here.
        session.ask("SELECT count(label) FROM llm_classify_batch('SELECT id, body FROM ticket WHERE id <= 200', 'topic')")
        for n in range(1, rounds + 1):
            time.sleep(70)
            statement(n * 1_000, 1_000)
        time.sleep(70)
        pid = session.ask(gateway)
        session.ask(f"SELECT pg_terminate_backend({pid}, 10000)")
        while session.ask(f"SELECT count(*) FROM ({gateway}) g WHERE pid <> {pid}") != "1":
            time.sleep(0.1)
        statement((rounds + 1) * 1_000, 500)
        session.close()
    result = {"window": window, "seconds": took, "ratios": ratios, "refused": refused, "load": os.getloadavg()[0]}
    if window < 60:
        return result, [Goal("429s of the first burst", refused[0], most=2), Goal("429s later", sum(refused[1:]), most=0)]
    return result, [Goal("429s", sum(refused), most=0),
                    Goal("1,000 rows after a rest, x its slowest request", max(ratios[:-1]), most=1.3),
                    Goal("500 rows after a restart, x its slowest request", ratios[-1], most=2.3)]


def interactive(window: int, calls: int = 30) -> Result:
    """A session beside a job that uses up the limit: how much longer does it wait than for its request alone?"""
    limit = ["--window", str(window), "--tokens-per-window", str(TOKENS_PER_MINUTE * window // 60)]
    minutes = (window + calls * 2.5 + 30) / 60  # more than it will take
    rows = int(minutes * 9_500)
    with Provider([*LATENCY, *limit]) as provider, Cluster(provider, 50, TOKENS_PER_MINUTE) as cluster:
        cluster.fill(rows)
        session = Session(cluster)
        number = rows + 1

        def call() -> float:
            nonlocal number
            number += 1
            began = time.monotonic()
            if not session.ask(f"SELECT llm_classify('{_quoted(number)}', 'topic')"):
                raise RuntimeError("the session got no label")
            return time.monotonic() - began

        call()  # loads what a session loads once
        time.sleep(window)
        provider.reset()
        alone = [call() for _ in range(40)]
        reference = provider.totals()["latency_ms_mean"] / 1000  # of the request itself
        time.sleep(window)
        provider.reset()
        job = cluster.backfill()
        time.sleep(window + 5)
        beside = []
        for _ in range(calls):
            beside.append(call())
            time.sleep(1)
        progress = cluster.progress(job)
        stats = provider.totals()
        cluster.sql(f"SELECT llm_batch.cancel({job})")
        session.close()
    if progress["status"] != "running":
        raise RuntimeError(f"the job is {progress['status']}: it ended too early to be a load")
    median, p95 = statistics.median(beside) / reference, statistics.quantiles(beside, n=20)[-1] / reference
    result = {"window": window, "request_alone_seconds": reference,
              "call_alone_median_seconds": statistics.median(alone), "median": median, "p95": p95, "seconds": beside,
              "window_used": stats["window_used"], "by_status": stats["by_status"], "load": os.getloadavg()[0]}
    return result, [Goal("median, x latency of its request", median, most=1.5)]


def _quoted(number: int) -> str:
    return ticket(number).replace("'", "''")


def job_seconds(cluster: Cluster, job: int) -> float:
    return float(cluster.sql(f"SELECT extract(epoch FROM updated_at - started_at) FROM llm_batch.progress WHERE job_id = {job}"))


def _memory(memory: Memory) -> dict[str, float]:
    return {"pss": memory.pss, "private": memory.private, "anonymous": memory.anonymous}


def _claim_plan(cluster: Cluster, last: int) -> str:
    """How Postgres reads the page after row `last` now, with the settings and the form of src/job/plan.rs."""
    settings = "".join(f"SET enable_{path} = off; " for path in ["sort", "incremental_sort", "seqscan", "bitmapscan"])
    return cluster.sql(f"""{settings} EXPLAIN (ANALYZE, BUFFERS)
        SELECT array_agg(q.k), array_agg(q.t), array_agg(q.h), array_agg(q.j)
          FROM (SELECT id AS k, left((body)::text, 1000000) AS t, hashtextextended((body)::text COLLATE "C", 0) AS h,
                       jsonb_build_object('id', id) AS j
                  FROM ONLY ticket WHERE topic IS NULL AND (true) AND coalesce((body)::text, '') <> ''
                   AND id > (ARRAY[{last}]::bigint[])[1] ORDER BY id LIMIT 500) q
        HAVING count(*) > 0""")


def _at(samples: list[dict], done: float) -> float | None:
    """When so many rows were done, between two samples."""
    for a, b in zip(samples, samples[1:]):
        if a["done"] <= done < b["done"]:
            return a["at"] + (b["at"] - a["at"]) * (done - a["done"]) / (b["done"] - a["done"])
    return None


def rate(samples: list[dict], begin: float, end: float) -> float | None:
    first, last = _at(samples, begin), _at(samples, end)
    return (end - begin) / (last - first) if first and last else None


def _most(samples: list[dict], kind: str, begin: float, end: float) -> dict[str, float] | None:
    """The most that a process took while so many rows were done."""
    seen = [s[kind] for s in samples if kind in s and 0 < s["done"] and begin <= s["done"] <= end]
    return {key: max(s[key] for s in seen) for key in seen[0]} if seen else None
