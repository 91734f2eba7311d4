"""One bad provider or one bad role beside healthy sessions and a healthy job: what does it do to them, and to the gateway?

Everything healthy goes on all the time. Each attack is looked at for some seconds, beginning with its first; before and
after it the same is looked at alone.
"""

import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

from cases import Goal
from lab import GATEWAY, ROOT, Cluster, Memory, Provider, Session, Watch
from tickets import LABELS

SECONDS = 6  # an attack, and what is healthy alone
SESSIONS = 4
FILES = 1_024  # as many Linux gives by default
MEMORY_MIB = 32  # llm_batch.gateway_memory
MOST_MIB = MEMORY_MIB + 64
HEALTHY_MS = 150
MODELS = 6
LABEL = "(ARRAY['" + "','".join(LABELS) + "'])[(i * 5 % 8) + 1]"
ABSURD = "x-ratelimit-limit-tokens: 1\r\nx-ratelimit-limit-requests: 1\r\nx-ratelimit-remaining-tokens: 0\r\n"
NO_WAIT = "Raw:HTTP/1.1 429 X\r\nretry-after: 0\r\ncontent-length: 2\r\n\r\n{}"

# What one saw of the attacker, and what is wanted of it.
Seen = tuple[str, list[Goal]]
# Prepares, yields, attacks, yields, ends it and tells.
Attack = Callable[["Siege"], Generator[None, None, Seen]]

# What makes no load is looked at by a test of pgrx-tests/tests: its file and name.
TESTED = {
    "a domain's CHECK as bait": "planted literals_are_read_as_the_owner",
    "other code that a role has planted": "planted a_superuser_fills_a_minefield",
    "the table's owner changes, a partition is another's": "rights a_superuser_fills_no_table_of_another_role",
    "a server is renamed or dropped": "rights owners_and_servers_that_go",
    "default_model of a caller": "rights whose_default_model_it_is",
    "REVOKE, a changed mapping or model between two FETCHes": "batch what_changes_between_two_fetches",
    "a setting that a policy reads between two FETCHes": "batch rows_of_the_session_as_it_is",
    "row security changes while a job runs": "rights row_security_that_changes_in_the_middle",
    "the owner may not log in any more": "rights an_owner_that_loses_usage_or_login_in_the_middle",
    "a view that asks a model": "errors functions_that_ask_while_a_job_reads",
    "numbers that are none, in options": "errors names_and_options",
    "FETCH BACKWARD": "batch a_cursor_goes_back",
    "volatile functions below the node": "batch what_reading_does_is_not_done_for_rows_that_nobody_takes",
}


def _untested() -> list[str]:
    """Those of TESTED whose test is not there."""
    folder = ROOT / "pgrx-tests/tests"
    tests: dict[str, str] = {}
    for path in folder.rglob("*.rs"):
        name = path.relative_to(folder).parts[0].removesuffix(".rs")
        tests[name] = tests.get(name, "") + path.read_text()
    return [what for what, test in TESTED.items() if f"\nfn {test.split()[1]}(" not in tests.get(test.split()[0], "")]


class Healthy:
    """Sessions that ask one small statement after the other, all the time: when each began, and how long it took."""

    def __init__(self, cluster: Cluster) -> None:
        self.done = threading.Event()
        self.calls: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._run, args=(cluster, n), daemon=True) for n in range(SESSIONS)]
        for thread in self.threads:
            thread.start()

    def _run(self, cluster: Cluster, session: int) -> None:
        asking = Session(cluster)
        number = 900_000 + 20_000 * session
        while not self.done.is_set():
            number += 1
            began = time.monotonic()
            try:
                got = asking.ask(f"SELECT llm_classify('x #r{number:06}:bug# y', 'call{session}')")
            except RuntimeError as error:
                got = str(error)
            self.calls.append((began, time.monotonic() - began))
            if got != "bug":
                self.failed.append(got)
                time.sleep(0.1)
        asking.close()

    def stop(self) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()

    def times(self, windows: list[tuple[float, float]]) -> tuple[float, float]:
        """The median and the 95th percentile, ms, of what began in these windows."""
        ms = sorted(1000 * took for began, took in self.calls if any(a <= began <= b for a, b in windows))
        if len(ms) < 20:
            raise RuntimeError(f"{len(ms)} calls of healthy sessions in {windows}")
        return statistics.median(ms), statistics.quantiles(ms, n=20)[-1]


class Siege:
    """A cluster with what is healthy, and a server that is in bad hands. `mallory` has USAGE on that and no other right."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.bad: Provider  # each attack has its own, of which nothing is known
        self.next_row = 200_000
        self.tables = 0
        self.samples: list[tuple[float, int, float, int]] = []  # when, rows of the job, MiB and files of the gateway
        self._set_up()
        self.gateway = next(pid for pid, kind, _ in cluster.processes() if kind == GATEWAY)
        limits = Path(f"/proc/{self.gateway}/limits").read_text()
        self.files = int(limits.split("Max open files")[1].split()[0])
        self.looker = Session(cluster)
        self.job = cluster.backfill()
        self.healthy = Healthy(cluster)

    def _set_up(self) -> None:
        c = self.cluster
        calls = "".join(f"SELECT llm_batch.create_classifier('call{n}', model => 'calls', labels => '[\"bug\", \"praise\"]');"
                        for n in range(SESSIONS))
        models = "".join(
            f"""SELECT llm_batch.create_model('bad{n}', server => 'bad', model => 'bad{n}', requests_per_minute => 1000000,
                                              input_price => 1, output_price => 4);
                SELECT llm_batch.create_classifier('bad{n}', model => 'bad{n}', labels => '{{{", ".join(f'"{label}": "{label}"' for label in LABELS)}}}');"""
            for n in range(MODELS))
        c.sql(f"""
            SELECT llm_batch.alter_model('fake', max_concurrent_requests => 2);
            SELECT llm_batch.create_model('calls', server => 'fake', model => 'calls');
            {calls}
            CREATE SERVER bad FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url 'http://localhost:1/v1');
            CREATE ROLE mallory LOGIN; GRANT USAGE ON FOREIGN SERVER bad TO mallory; GRANT CREATE ON SCHEMA public TO mallory""")
        self.mallory(f"""{models}
            SELECT llm_batch.create_model('good', server => 'bad', model => 'good');
            SELECT llm_batch.create_classifier('good', model => 'good', labels => '{{{", ".join(f'"{label}": "{label}"' for label in LABELS)}}}')""")

    def look(self) -> None:
        done = int(self.looker.ask(f"SELECT coalesce(max(rows_done), 0) FROM llm_batch.progress WHERE job_id = {self.job}"))
        self.samples.append((time.monotonic(), done, Memory(self.gateway).pss, len(os.listdir(f"/proc/{self.gateway}/fd"))))

    # What attacks are made of

    def mallory(self, statement: str, **variables: str) -> str:
        return self.cluster.sql(statement, user="mallory", **variables)

    def table(self, rows: int, body: str = "''") -> str:
        """A new table of the attacker with texts that were not asked before."""
        self.tables += 1
        name, first = f"t{self.tables}", self.next_row
        self.next_row += rows
        self.mallory(f"""CREATE TABLE {name} (id bigint PRIMARY KEY, body text, want text, topic text);
            INSERT INTO {name} SELECT i, format('x #r%s:%s# y ', to_char(i, 'FM000000'), {LABEL}) || {body}, {LABEL}
                               FROM generate_series({first}, {first + rows - 1}) i; ANALYZE {name}""")
        return name

    def answered(self, models: int) -> None:
        """Models that have answered something may have more requests at a time."""
        for n in range(models):
            table = self.table(8)
            self.mallory(f"SELECT count(llm_classify(body, 'bad{n}')) FROM {table}")

    def backfill(self, table: str, task: str, rows: int, more: str = "") -> int:
        options = f'{{"max_rows_per_request": {rows}}}'
        return int(self.mallory(f"""SELECT llm_batch.backfill('{table}', input => 'body', target => 'topic', task => '{task}',
                                                              options => '{options}'{more})"""))

    def cancel(self, jobs: list[int]) -> float:
        """Cancels jobs; seconds until their workers and requests have gone."""
        began = time.monotonic()
        for job in jobs:
            self.mallory(f"SELECT llm_batch.cancel({job})")
        ids = ", ".join(map(str, jobs))
        at_work = f"SELECT count(*) FROM pg_stat_activity WHERE application_name IN (SELECT 'llm_batch job ' || unnest(ARRAY[{ids}]))"
        self.until("the jobs have gone", lambda: self.cluster.sql(at_work) == "0" and self.bad.totals()["in_flight"] == 0)
        return time.monotonic() - began

    def until(self, what: str, is_so: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise RuntimeError(f"in vain: {what}")
            time.sleep(0.05)

    def wrong(self, tables: list[str]) -> int:
        return sum(int(self.cluster.sql(f"SELECT count(*) FROM {table} WHERE topic <> want")) for table in tables)

    def wait(self, job: int, seconds: float) -> dict:
        self.cluster.sql(f"CALL llm_batch.wait({job}, interval '{seconds:.0f} s')")
        return self.cluster.progress(job)


def _many(faults: dict[str, float], models: int, rows_a_request: int, rows: int = 3_000) -> Attack:
    """Jobs of so many models whose requests meet these faults; none of their rows gets a wrong label."""

    def attack(s: Siege) -> Generator[None, None, Seen]:
        s.answered(models)
        tables = [s.table(rows) for _ in range(models)]
        s.bad.reset()
        yield
        # backfill() asks whether the model answers.
        jobs = [s.backfill(table, f"bad{n}", rows_a_request) for n, table in enumerate(tables)]
        s.bad.control(faults=faults)
        yield
        met = sum(s.bad.totals()["faults"].values())
        gone = s.cancel(jobs)
        wrong = s.wrong(tables)
        return f"{met} requests, gone {gone:.1f} s after cancel()", [Goal("requests", met, least=models), Goal("wrong labels", wrong, most=0)]

    return attack


def silent(s: Siege) -> Generator[None, None, Seen]:
    s.answered(MODELS)
    tables = [s.table(300) for _ in range(MODELS)]
    yield
    s.bad.control(hold=True)
    jobs = [s.backfill(table, f"bad{n}", 1) for n, table in enumerate(tables)]
    yield
    under_way = s.bad.totals()["in_flight"]
    began = time.monotonic()
    seen = int(s.cluster.sql("SELECT count(*) FROM llm_batch.activity WHERE in_flight_requests > 0 AND model LIKE 'bad_'"))
    ms = 1000 * (time.monotonic() - began)
    s.cancel(jobs)
    s.bad.control(hold=False)
    return f"{under_way} requests hang, activity shows {seen} models in {ms:.0f} ms", [Goal("models at work", seen, least=MODELS)]


def _texts(sessions: int, rows: int, body: str, options: str) -> Attack:
    """Sessions that hand over as many texts as they may, and nobody answers."""

    def attack(s: Siege) -> Generator[None, None, Seen]:
        s.answered(1)
        table = s.table(rows, body)
        query = f"SELECT count(label) FROM llm_classify_batch('SELECT id, body FROM {table}', 'bad0', options => '{options}')"
        asking = [Session(s.cluster, "mallory") for _ in range(sessions)]
        yield
        s.bad.control(hold=True)
        for session in asking:
            session.send(query)
        yield
        s.cluster.sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'mallory'")
        s.bad.control(hold=False)
        for session in asking:
            session.close()
        return f"{sessions} sessions", []

    return attack


def twice(s: Siege) -> Generator[None, None, Seen]:
    s.answered(4)
    bad, good = [s.table(2_000) for _ in range(4)], s.table(4_000)
    s.bad.reset()
    yield
    s.bad.control(faults={"Twice": 1.0}, faulty="bad")
    jobs = [s.backfill(table, f"bad{n}", 10) for n, table in enumerate(bad)]
    honest = s.backfill(good, "good", 10)
    yield
    progress = s.wait(honest, 60)
    asked = s.bad.totals()["requests"]
    s.cancel(jobs)
    done = int(s.cluster.sql(f"SELECT {' + '.join(f'(SELECT count(topic) FROM {table})' for table in bad)}"))
    wrong, honest_wrong = s.wrong(bad), s.wrong([good])
    s.bad.control(faulty=None)
    return (f"{asked} requests for {done} rows of bad and {progress['rows_done']} of an honest model on the same host",
            [Goal("wrong labels", wrong, most=0), Goal("the honest model's", honest_wrong, most=0),
             Goal("the honest model's rows", progress["rows_done"], least=4_000),
             Goal("its requests", progress["requests"], most=4_000 / 10 + 20)])


def absurd_limits(s: Siege) -> Generator[None, None, Seen]:
    s.answered(1)
    table = s.table(2_000)
    yield
    raw = {f"Raw:HTTP/1.1 {status} X\r\n{ABSURD}content-length: 2\r\n\r\n{{}}": rate for status, rate in [(500, 0.3), (429, 0.2)]}
    job = s.backfill(table, "bad0", 20)
    s.bad.control(faults=raw | {"TooLarge429": 0.2})
    yield
    s.bad.control(faults={})
    progress = s.wait(job, 120)
    return (f"{progress['rows_done']} of 2,000 rows, {progress['rows_failed'] + progress['rows_skipped']} failed or skipped",
            [Goal("rows done", progress["rows_done"], least=2_000), Goal("wrong labels", s.wrong([table]), most=0)])


def no_wait(s: Siege) -> Generator[None, None, Seen]:
    s.answered(1)
    table = s.table(2_000)
    s.bad.reset()
    yield
    began = time.monotonic()
    job = s.backfill(table, "bad0", 1)
    s.bad.control(faults={NO_WAIT: 1.0})
    yield
    requests, seconds = s.bad.totals()["requests"], time.monotonic() - began
    s.cancel([job])
    return f"{requests / seconds:.1f} requests/s", [Goal("requests/s", requests / seconds, most=50)]


def paid_refusals(s: Siege) -> Generator[None, None, Seen]:
    s.answered(1)
    table = s.table(2_000)
    s.bad.reset()
    yield
    job = s.backfill(table, "bad0", 1)
    s.bad.reset()
    s.bad.control(faults={'Status:200:{"error": {"message": "Rate limit exceeded", "code": 429}}': 1.0})
    yield
    s.until("it pauses", lambda: s.cluster.progress(job)["status"] == "paused", 120)
    requests = s.bad.totals()["requests"]
    s.cancel([job])
    return f"{requests} requests, then paused", [Goal("requests", requests, most=100)]


def _bills(fault: str) -> Attack:
    def attack(s: Siege) -> Generator[None, None, Seen]:
        s.answered(1)
        table = s.table(2_000)
        s.bad.reset()
        yield
        s.bad.control(faults={fault: 1.0})
        job = s.backfill(table, "bad0", 20, ", max_cost => 1")
        yield
        p = s.wait(job, 120)
        totals = s.bad.totals()
        billed = (totals["prompt_tokens"] + 4 * totals["completion_tokens"]) / 1e6
        counted = float(p["cost"]) + float(p["cost_unconfirmed"])
        unconfirmed = s.cluster.sql(f"SELECT tokens_unconfirmed FROM llm_batch.job_state WHERE job_id = {job}")
        output = p["output_tokens"] + int(unconfirmed)
        return (f"{p['rows_done']} of 2,000 rows, $ {billed:.4f} billed, {counted:.4f} counted, {float(p['cost_unconfirmed']):.4f} of it unconfirmed",
                [Goal("rows done", p["rows_done"], least=2_000), Goal("rows skipped", p["rows_skipped"], most=0),
                 Goal("counted / billed", counted / billed, least=1, most=3), Goal("answers' tokens", output, least=1)])

    return attack


def cancels(s: Siege) -> Generator[None, None, Seen]:
    s.answered(MODELS)
    times: list[float] = []
    yield
    s.bad.control(hold=True)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        jobs = [s.backfill(s.table(100), f"bad{n}", 1) for n in range(MODELS)]
        s.until("requests hang", lambda: s.bad.totals()["in_flight"] > 0)
        times.append(s.cancel(jobs))
    yield
    s.bad.control(hold=False)
    return f"{len(times)} times {MODELS} jobs, gone after {max(times):.1f} s at most", [Goal("seconds until gone", max(times), most=2)]


def greedy(s: Siege) -> Generator[None, None, Seen]:
    table = s.table(5)
    calls = ", ".join(f"""llm_filter(body, 'Is it {n}?', '{{"model": "bad0", "max_rows_per_request": 1}}')""" for n in range(450))
    ends: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                s.mallory(f"SELECT {calls} FROM {table} LIMIT 5", VERBOSITY="sqlstate")
                ends.append("no error")
            except RuntimeError as error:
                ends.append(str(error).split()[-1])

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    s.answered(1)
    yield
    s.bad.control(hold=True)
    for thread in threads:
        thread.start()
    yield
    stop.set()
    s.bad.control(hold=False)
    for thread in threads:
        thread.join()
    other = [end for end in ends if end != "53000"]
    return f"{len(ends)} times {', '.join(sorted(set(ends)))}", [Goal("other ends than 53000", len(other), most=0)]


ATTACKS: dict[str, Attack] = {
    "six models on a silent server": silent,
    "answers of 4 MiB, a byte short": _many({"ByteShort": 1.0}, MODELS, 1),
    "100 Continue for ever": _many({"Continues": 1.0}, MODELS, 20),
    "a body without end": _many({"Endless": 1.0}, MODELS, 1),
    "answers that come twice": twice,
    "one absurd limit": absurd_limits,
    "Retry-After: 0 on every 429": no_wait,
    "429 within a 200": paid_refusals,
    "no usage, with a budget": _bills("NoUsage"),
    "half of the usage": _bills("PromptUsage"),
    "cancel() while requests hang": cancels,
    "three sessions with 450 calls": greedy,
    "4 MiB of texts of each of 30 sessions": _texts(30, 500, "repeat('All work and no play. ', 900)", "{}"),
    "the same with a budget": _texts(30, 500, "repeat('All work and no play. ', 900)", '{"max_cost": 1}'),
    "texts whose tokens take long to count": _texts(4, 64, "repeat('a', 900000)", "{}"),
}


def siege(only: str = "") -> tuple[dict, list[Goal]]:
    """Attacks one after the other; `only` those in whose names this expression is found."""
    chosen = {name: attack for name, attack in ATTACKS.items() if re.search(only, name)}
    conf = f"max_worker_processes = 32\nllm_batch.max_job_workers = 16\nllm_batch.gateway_memory = {MEMORY_MIB}MB"
    with ExitStack() as stack:
        good = stack.enter_context(Provider(["--base-ms", str(HEALTHY_MS)]))
        cluster = stack.enter_context(Cluster(good, 20, None, conf, FILES))
        cluster.fill(min(150_000, 20_000 + 12_000 * len(chosen)))
        s = Siege(cluster)
        stack.callback(s.healthy.stop)
        with Watch(0.1, s.look):
            time.sleep(3)  # what is learnt of the healthy models
            lines = []
            for name, attack in chosen.items():
                with Provider(["--base-ms", "50"]) as s.bad:
                    cluster.sql(f"ALTER SERVER bad OPTIONS (SET base_url '{s.bad.base_url}')")
                    lines.append(_line(s, name, attack))
            alone = (time.monotonic(), time.monotonic() + SECONDS)
            time.sleep(SECONDS)
        job = cluster.progress(s.job)
        wrong = cluster.lost_and_wrong()[1]
    afters = [line["alone"] for line in lines[1:]] + [alone]
    for line, after in zip(lines, afters):
        before, window = line.pop("alone"), line.pop("window")
        line["ratios"] = _ratios(s, [before, after], window) if window[0] < window[1] else None
    return _result(s, lines, job, wrong)


def _line(s: Siege, name: str, attack: Attack) -> dict:
    """Carries out an attack. `goals` and `windows` are for what is worked out at the end."""
    running = attack(s)
    alone = began = ended = time.monotonic()
    try:
        next(running)
        alone = time.monotonic()
        time.sleep(SECONDS)
        began = time.monotonic()
        next(running)
        time.sleep(max(0, began + SECONDS - time.monotonic()))
        ended = time.monotonic()
        seen, goals = _end(running)
    except RuntimeError as error:
        seen, goals = f"failed: {str(error).splitlines()[0]}", [Goal("was carried out", 0, least=1)]
    s.mallory("SELECT llm_batch.cancel(job_id) FROM llm_batch.progress WHERE status NOT IN ('done', 'failed', 'cancelled')")
    print(f"  {name}: {seen}", *(f"\n    {goal}" for goal in goals), flush=True)
    return {"attack": name, "seen": seen, "goals": goals, "alone": (alone, began), "window": (began, ended)}


def _end(running: Generator[None, None, Seen]) -> Seen:
    try:
        next(running)
    except StopIteration as end:
        return end.value
    raise AssertionError("an attack has two parts")


def _ratios(s: Siege, alone: list[tuple[float, float]], window: tuple[float, float]) -> dict:
    def pace(a: float, b: float) -> float:
        inside = [sample for sample in s.samples if a <= sample[0] <= b]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    alone = [(a, b) for a, b in alone if b - a > SECONDS / 2]
    p50, p95 = s.healthy.times(alone)
    p50_now, p95_now = s.healthy.times([window])
    pss, files = (max(sample[n] for sample in s.samples if window[0] <= sample[0] <= window[1]) for n in (2, 3))
    pace_alone = statistics.mean(pace(*w) for w in alone)
    return {"p50_ms": (p50, p50_now), "p95_ms": (p95, p95_now), "p50": p50_now / p50, "p95": p95_now / p95,
            "rows_per_second": (pace_alone, pace(*window)), "pace": pace_alone / max(pace(*window), 0.1),
            "pss_mib": pss, "files": files}


def _result(s: Siege, lines: list[dict], job: dict, wrong: int) -> tuple[dict, list[Goal]]:
    titles = ["attack", "p50 alone, attacked", "x", "p95 alone, attacked", "x", "rows/s alone, attacked", "x", "MiB", "files", "seen"]
    table, goals = [titles], []
    for line in lines:
        r, name = line["ratios"], line["attack"]
        goals += [Goal(f"{name}: {goal.what}", goal.value, goal.least, goal.most) for goal in line.pop("goals")]
        if not r:
            table.append([name, *[""] * 8, line["seen"]])
            continue
        cells = [name]
        for key, ratio, digits in [("p50_ms", "p50", 0), ("p95_ms", "p95", 0), ("rows_per_second", "pace", 0)]:
            cells += [", ".join(f"{value:.{digits}f}" for value in r[key]), f"{r[ratio]:.2f}"]
        table.append([*cells, f"{r['pss_mib']:.0f}", str(r["files"]), line["seen"]])
        goals += [Goal(f"{name}: p50 x", r["p50"], most=1.5), Goal(f"{name}: p95 x", r["p95"], most=1.5),
                  Goal(f"{name}: the job's pace, alone / attacked", r["pace"], most=1.5),
                  Goal(f"{name}: gateway PSS MiB", r["pss_mib"], most=MOST_MIB),
                  Goal(f"{name}: files", r["files"], most=0.8 * s.files)]
    goals += [Goal("healthy calls that failed", len(s.healthy.failed), most=0), Goal("wrong labels of the healthy job", wrong, most=0),
              Goal("lines without load that have no test", len(_untested()), most=0),
              Goal("the healthy job is still running", float(job["status"] == "running"), least=1)]
    table += [[what, *[""] * 8, test.replace(" ", ".rs: ")] for what, test in TESTED.items()]
    result = {"gateway_memory_mib": MEMORY_MIB, "files_limit": s.files, "healthy_calls": len(s.healthy.calls),
              "failed": s.healthy.failed[:5], "load": os.getloadavg()[0], "lines": lines, "table": table}
    return result, goals
