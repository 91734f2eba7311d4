"""What a case runs in: a provider and a cluster of its own, and a look at what their processes take."""

import contextlib
import json
import os
import queue
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tickets import INSTRUCTION, LABELS, label, ticket

ROOT = Path(__file__).resolve().parent.parent
PROVIDER = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"), "release/llm-fake-provider")
GATEWAY, JOB = "llm_batch gateway", "llm_batch job"  # as their processes are titled
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def lib(script: str) -> str:
    """Runs functions of scripts/lib.sh."""
    command = ["bash", "-c", f'. "{ROOT}/scripts/lib.sh"; {script}']
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True).stdout


def quoted(text: str) -> str:
    """A literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


class Provider:
    """A fake provider, a process of its own."""

    def __init__(self, options: list[str]) -> None:
        command = [str(PROVIDER), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        ready = self.process.stdout.readline()
        if not ready:
            raise RuntimeError(f"the fake provider did not start: {' '.join(command)}")
        said = json.loads(ready)
        self.base_url: str = said["base_url"]
        self.bases: dict[str, str] = said["bases"]  # by dialect

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url.removesuffix("/v1") + path, data)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def stats(self) -> dict:
        """Its counts, the rows only as numbers."""
        stats = self._call("/stats")
        asked = [row["asked"] for row in stats.pop("rows").values()]
        return stats | {"rows_asked": len(asked), "rows_asked_again": sum(asked) - len(asked)}

    def asked(self) -> Counter[str]:
        """How often each row was asked."""
        return Counter({row: counts["asked"] for row, counts in self._call("/stats")["rows"].items()})

    def totals(self) -> dict:
        """Its counts without the rows: cheap, so that it can be asked while something is measured."""
        return self._call("/stats/totals")

    def control(self, **changes: object) -> None:
        """Changes it, see crates/fake-provider/src/control.rs."""
        self._call("/control", changes)

    def reset(self) -> None:
        self.control(reset_stats=True)

    def cpu_ms(self) -> float:
        return _stat(self.process.pid).own_ms


class Door:
    """A way to a provider that can be shut: then connections are refused. Or silenced: they are accepted, and nothing passes."""

    def __init__(self, provider: Provider) -> None:
        to = urlsplit(provider.base_url)
        self.to, self.port, self.is_silent = (to.hostname, to.port), 0, False
        self.ends: list[socket.socket] = []
        self.open()
        self.base_url = f"http://127.0.0.1:{self.port}{to.path}"

    def open(self) -> None:
        """Opens it, if it was shut; if it was silenced, what was on its way then is lost."""
        self.shut()
        self.is_silent = False
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        ends = [*([self.listener] if self.port else []), *self.ends]
        self.ends.clear()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # close() alone ends no call that waits
            end.close()

    def silence(self) -> None:
        self.is_silent = True

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(self.to)
                self.ends += [near, far]
                for way in [(near, far), (far, near)]:
                    threading.Thread(target=self._pass, args=way, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.is_silent:
                    sink.sendall(data)
            if not self.is_silent:
                sink.shutdown(socket.SHUT_WR)


class Stat:
    """/proc/PID/stat, as far as we need it."""

    def __init__(self, text: str) -> None:
        fields = text.rpartition(")")[2].split()
        self.parent = int(fields[1])
        self.own_ms = (int(fields[11]) + int(fields[12])) * TICK_MS
        self.reaped_ms = (int(fields[13]) + int(fields[14])) * TICK_MS


def _stat(pid: int) -> Stat:
    return Stat(Path(f"/proc/{pid}/stat").read_text())


def _kind(pid: int) -> str:
    title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    title = title.strip().removeprefix("postgres: ")
    for kind in (GATEWAY, JOB, "llm_batch launcher", "llm_batch finder", "walwriter",
                 "checkpointer", "background writer", "autovacuum"):
        if title.startswith(kind):
            return kind
    return "other"


class Memory:
    """/proc/PID/smaps_rollup in MiB. Of what several processes have mapped, PSS counts each one's share."""

    def __init__(self, pid: int) -> None:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {name.strip(): int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        self.pss = kib["Pss"] / 1024
        self.private = (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024
        self.anonymous = kib.get("Pss_Anon", 0) / 1024  # without shared buffers and the program's files


class Cluster:
    """A throwaway cluster with the extension, and what its processes take."""

    def __init__(self, provider: "Provider | Door", rows_per_request: int, tokens_per_minute: int | None, conf: str = "",
                 files: int | None = None) -> None:
        """`conf`: lines of postgresql.conf. `files`: how many a process of it may have open."""
        limit = f"ulimit -n {files}; " if files else ""
        self.folder = lib(f"""{limit}start_cluster bench "{conf}"; echo "$CLUSTER" """).strip().splitlines()[-1]
        self.bin = lib("bin").strip()
        self.postmaster = int(Path(self.folder, "data/postmaster.pid").read_text().split()[0])
        try:
            self.gateway_idle = self._settled()
            self.sql(file="setup.sql", base_url=provider.base_url, tokens=tokens_per_minute or "",
                     instruction=INSTRUCTION, labels=json.dumps(LABELS), rows_per_request=rows_per_request)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        lib(f"stop_cluster {self.folder}")

    # SQL

    def psql(self, *arguments: str) -> list[str]:
        return [f"{self.bin}/psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", self.folder, "-U", "postgres", "-d", "bench",
                *arguments]

    def sql(self, statement: str = "", file: str | None = None, stdin: Iterable[str] = (), user: str = "postgres",
            **variables: object) -> str:
        """Runs a statement, or a file of this folder; what it prints."""
        what = ["-U", user, *(["-f", str(ROOT / "bench" / file)] if file else ["-c", statement])]
        command = self.psql(*(x for name, value in variables.items() for x in ("-v", f"{name}={value}")), *what)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            try:
                process.stdin.writelines(stdin)
                out, error = process.communicate()
            except BaseException:  # told to stop: not only when the job is done
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(error.strip() or f"psql ended with {process.returncode}")
        return out.strip()

    def fill(self, rows: int) -> None:
        lines = (f"{number}\t{ticket(number)}\t{label(number)}\n" for number in range(1, rows + 1))
        self.sql("COPY ticket (id, body, want) FROM STDIN", stdin=lines)
        self.sql("VACUUM ANALYZE ticket")
        self.sql("CHECKPOINT")

    def model(self, name: str, base_url: str, api: str = "openai", **settings: float) -> None:
        """A further model, with a server of its own."""
        self.sql(f"CREATE SERVER {name} FOREIGN DATA WRAPPER llm_provider OPTIONS (api '{api}', base_url '{base_url}')")
        more = "".join(f", {setting} => {value}" for setting, value in settings.items())
        self.sql(f"SELECT llm_batch.create_model('{name}', server => '{name}', model => '{name}'{more})")

    def classifier(self, name: str, model: str, rows_per_request: int) -> None:
        """The classifier of bench/tickets.py for another model."""
        options = json.dumps({"max_rows_per_request": rows_per_request})
        self.sql(f"SELECT llm_batch.create_classifier('{name}', {quoted(json.dumps(LABELS))}::json, '{model}', {quoted(INSTRUCTION)}, "
                 f"options => '{options}')")

    def backfill(self, table: str = "ticket", target: str = "topic", task: str = "topic", **options: object) -> int:
        """Starts the job; its id."""
        return int(self.sql(f"SELECT llm_batch.backfill('{table}', input => 'body', target => '{target}', task => '{task}', "
                            f"options => {quoted(json.dumps(options))})"))

    def wait(self, job: int, most_seconds: float) -> None:
        self.sql(f"CALL llm_batch.wait({job}, interval '{most_seconds:.0f} s')")

    def progress(self, job: int) -> dict:
        return json.loads(self.sql(f"SELECT to_jsonb(p) FROM llm_batch.progress p WHERE job_id = {job}"))

    def lost_and_wrong(self, table: str = "ticket") -> tuple[int, int]:
        counts = self.sql(f"SELECT count(*) FILTER (WHERE topic IS NULL), count(*) FILTER (WHERE topic <> want) FROM {table}")
        lost, wrong = map(int, counts.split("|"))
        return lost, wrong

    # Processes

    def processes(self) -> Iterator[tuple[int, str, Stat]]:
        """Process id, kind and stat of each process of the cluster."""
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                stat = _stat(pid)
                if pid == self.postmaster:
                    yield pid, "postmaster", stat
                elif stat.parent == self.postmaster:
                    yield pid, _kind(pid), stat
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended

    def cpu_ms(self) -> float:
        """All that the cluster's processes took so far, those that ended included."""
        return sum(stat.own_ms + (stat.reaped_ms if kind == "postmaster" else 0) for _, kind, stat in self.processes())

    def memory(self, kind: str) -> Memory | None:
        for pid, found, _ in self.processes():
            if found == kind:
                try:
                    return Memory(pid)
                except (FileNotFoundError, ProcessLookupError):
                    return None
        return None

    def _settled(self) -> Memory:
        """The gateway's memory when it has loaded its tables and nothing was asked yet."""
        before, deadline = None, time.monotonic() + 20
        while time.monotonic() < deadline:
            now = self.memory(GATEWAY)
            if now and before and abs(now.private - before.private) < 0.5:
                return now
            before = now
            time.sleep(0.5)
        raise RuntimeError("the gateway did not start, or does not come to rest")


class Session:
    """A psql that stays connected. The errors of other users than `postgres` are not shown."""

    def __init__(self, cluster: Cluster, user: str = "postgres") -> None:
        errors = None if user == "postgres" else subprocess.DEVNULL
        self.process = subprocess.Popen(cluster.psql("-U", user), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                        text=True, bufsize=1)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True).start()

    def send(self, statement: str) -> None:
        print(statement + ";", file=self.process.stdin, flush=True)

    def line(self) -> str:
        """The next line that it prints."""
        try:
            return self.lines.get(timeout=120).rstrip("\n")
        except queue.Empty:
            raise RuntimeError("a session got no answer") from None

    def ask(self, statement: str) -> str:
        """A statement whose result is one line."""
        self.send(statement)
        return self.line()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Watch:
    """A thread that looks again and again while something runs."""

    def __init__(self, seconds: float, look: Callable[[], None]) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=(seconds, look), daemon=True)

    def _run(self, seconds: float, look: Callable[[], None]) -> None:
        try:
            look()
            while not self.done.wait(seconds):
                look()
        except Exception as error:  # shown by __exit__
            self.error = error

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if self.error and kind is None:
            raise self.error


class CpuByKind:
    """CPU of a cluster by kind of process, also of processes that end meanwhile (as far as they were seen)."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.before = {pid: stat.own_ms for pid, _, stat in cluster.processes()}
        self.latest: dict[int, tuple[str, float]] = {}
        self.total_before = cluster.cpu_ms()

    def look(self) -> None:
        for pid, kind, stat in self.cluster.processes():
            # A new process has its parent's title for a moment.
            self.latest[pid] = (kind, stat.own_ms)

    def result(self) -> dict[str, float]:
        self.look()
        kinds: dict[str, float] = defaultdict(float)
        for pid, (kind, ms) in self.latest.items():
            kinds[kind] += ms - self.before.get(pid, 0)
        kinds["not seen"] = self.cluster.cpu_ms() - self.total_before - sum(kinds.values())
        return dict(kinds)
