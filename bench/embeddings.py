"""Vectors: how much of a limit of tokens is used, and what the extension manages without one, with vectors as base64 and as
numbers."""

import os

from cases import LATENCY, Goal
from lab import GATEWAY, Cluster, CpuByKind, Provider, Watch
from special import Result, job_seconds

TOKENS_PER_MINUTE = 1_000_000
WINDOW = 6  # seconds
DIMENSIONS = 384
# The best peer that was measured on these texts: pgai's vectorizer used so much of the limit, at so many tokens a row.
PEER_USED, PEER_TOKENS = 0.74, 37.2


def embeddings(rows: int = 60_000) -> Result:
    """All of it; rows: those without a limit."""
    limited, wanted = limit()
    result: dict = {"limit": limited}
    goals = [Goal(f"limit: {goal.what}", goal.value, goal.least, goal.most) for goal in wanted]
    for encoding, options in [("base64", []), ("float", ["--no-base64"])]:
        with Provider(options) as provider:
            result[encoding] = found = _fill(provider, rows, None)
        goals.append(Goal(f"rows lost, {encoding}", found["lost"], most=0))
    base64, of_floats = result["base64"], result["float"]
    result["base64 / float"] = {key: base64[key] / of_floats[key] for key in ("rows_per_second", "cpu_ms_per_row")}
    return result | {"load": os.getloadavg()[0]}, [
        *goals, Goal("rows/s, base64", base64["rows_per_second"], least=8_000),
        Goal("CPU ms/row, base64", base64["cpu_ms_per_row"], most=0.15)]


def limit(rows: int = 18_000) -> Result:
    """A limit of tokens: used, without a refusal?"""
    per_window = TOKENS_PER_MINUTE * WINDOW // 60
    with Provider([*LATENCY, "--window", str(WINDOW), "--tokens-per-window", str(per_window)]) as provider:
        result = _fill(provider, rows, TOKENS_PER_MINUTE)
        stats = provider.stats()
    used, per_row = stats["window_used"], stats["prompt_tokens"] / rows
    steady, of_peer = used * TOKENS_PER_MINUTE / per_row, PEER_USED * TOKENS_PER_MINUTE / PEER_TOKENS
    refused = stats["by_status"].get("429", 0)
    result |= {"used": used, "refused": refused, "tokens_per_row": per_row, "steady_rows_per_minute": steady,
               "peak_window_tokens": stats["peak_window_tokens"], "peer_steady_rows_per_minute": of_peer}
    return result, [Goal("rows lost", result["lost"], most=0), Goal("used", used, least=0.97), Goal("429s", refused, most=0),
                    Goal("most tokens in a window", stats["peak_window_tokens"], most=per_window),
                    Goal("steady rows/min / the best peer's", steady / of_peer, least=1.3)]


def _column(cluster: Cluster) -> str:
    """The type of the column: pgvector's, where Postgres has it."""
    if cluster.sql("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'") == "0":
        return "real[]"
    cluster.sql("CREATE EXTENSION vector")
    return f"vector({DIMENSIONS})"


def _fill(provider: Provider, rows: int, tokens_per_minute: int | None) -> dict:
    with Cluster(provider, 50, tokens_per_minute) as cluster:
        of = _column(cluster)
        cluster.fill(rows)
        cluster.sql(f"ALTER TABLE ticket ADD v {of}")
        cluster.sql(f"SELECT llm_batch.create_embedder('vectors', 'fake', {DIMENSIONS})")
        cpu, provider_cpu, peak = CpuByKind(cluster), provider.cpu_ms(), [0.0]

        def look() -> None:
            cpu.look()
            if memory := cluster.memory(GATEWAY):
                peak[0] = max(peak[0], memory.pss)

        with Watch(0.25, look):
            job = cluster.backfill(target="v", task="vectors")
            cluster.wait(job, 600)
        cpu_ms = cpu.result()
        seconds = job_seconds(cluster, job)
        progress = cluster.progress(job)
        return {
            "column": of, "rows": rows, "seconds": seconds, "rows_per_second": rows / seconds,
            "lost": int(cluster.sql("SELECT count(*) FROM ticket WHERE v IS NULL")),
            "requests": progress["requests"], "tokens": progress["input_tokens"],
            "cpu_ms_per_row": sum(cpu_ms.values()) / rows,
            "cpu_ms_per_row_by_kind": {kind: ms / rows for kind, ms in sorted(cpu_ms.items(), key=lambda x: -x[1])},
            "provider_cpu_ms_per_row": (provider.cpu_ms() - provider_cpu) / rows,
            "gateway_pss_mib": peak[0], "gateway_idle_pss_mib": cluster.gateway_idle.pss,
        }
