"""The script of somebody who takes care: asyncio, many rows a call, numbers and one-token codes in the answer, its own
pacing by a rolling window, an estimate of tokens that is learnt from `usage`, answers checked, missing rows asked again.
With --objects it asks for several fields, as compact objects with the fields' names.
"""

import asyncio
import json
import sys
import time
from collections import deque

import httpx

from client import MODEL, arguments, read_rows, retry_after, writer
from fields import SYSTEM_OBJECTS, TWO_DATES
from tickets import LABELS, SYSTEM_PACK

TRIES = 6
SLACK = 0.03  # seconds by which our window is longer than the provider's: requests don't all travel equally fast
Row = tuple[int, str]


class Limiter:
    """At most `limit` tokens in any `window` seconds. What is reserved is corrected when the bill is known."""

    def __init__(self, limit: int, window: float) -> None:
        self.limit, self.window = limit, window + SLACK
        self.entries: deque[list[float]] = deque()  # [time, tokens]
        self.used = 0.0
        self.blocked_until = 0.0
        self.turn = asyncio.Lock()

    async def reserve(self, tokens: float) -> list[float]:
        async with self.turn:
            while wait := self._wait(tokens):
                await asyncio.sleep(min(wait, 0.05))  # a correction may make room earlier
            entry = [time.monotonic(), tokens]
            self.entries.append(entry)
            self.used += tokens
            return entry

    def _wait(self, tokens: float) -> float:
        now = time.monotonic()
        while self.entries and self.entries[0][0] + self.window <= now:
            self.used -= self.entries.popleft()[1]
        if now < self.blocked_until:
            return self.blocked_until - now
        if self.used + tokens <= self.limit or not self.entries:
            return 0
        return self.entries[0][0] + self.window - now

    def settle(self, entry: list[float], tokens: float) -> None:
        if entry[0] + self.window > time.monotonic():
            self.used += tokens - entry[1]
            entry[1] = tokens

    def penalize(self, seconds: float) -> None:
        self.blocked_until = max(self.blocked_until, time.monotonic() + seconds)


class Client:
    def __init__(self, base_url: str, limiter: Limiter, concurrency: int, answers: str, objects: bool) -> None:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.http = httpx.AsyncClient(base_url=base_url, timeout=120, limits=limits)
        self.limiter, self.objects = limiter, objects
        self.system = SYSTEM_OBJECTS if objects else SYSTEM_PACK
        self.tokens, self.bytes = 0.35, 1.0  # a guess at their relation, until the first bill
        self.write = writer(answers)
        self.lost = 0

    async def fill(self, rows: list[Row], tried: int = 0) -> None:
        """Asks for these rows until each has a valid answer."""
        while rows and tried < TRIES:
            answers = await self.ask(rows)
            tried += answers is not None
            missing = []
            for place, (number, text) in enumerate(rows, 1):
                answer = (answers or {}).get(str(place))
                if self.is_valid(answer):
                    self.write(number, json.dumps(answer) if self.objects else answer)
                else:
                    missing.append((number, text))
            rows = missing
        self.lost += len(rows)

    def is_valid(self, answer: object) -> bool:
        if self.objects:
            return isinstance(answer, dict) and list(answer) == TWO_DATES
        return isinstance(answer, str) and answer in LABELS

    async def ask(self, rows: list[Row]) -> dict | None:
        """The answer by place; None if the request was refused or lost, which is no try."""
        lines = "".join(f"{place}: {json.dumps(text, ensure_ascii=False)}\n" for place, (_, text) in enumerate(rows, 1))
        body = {"model": MODEL, "response_format": {"type": "json_object"},
                "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": lines}]}
        size = len(self.system) + len(lines)  # not bytes exactly, nor need it be
        entry = await self.limiter.reserve(size * self.tokens / self.bytes)
        try:
            response = await self.http.post("/chat/completions", json=body)
        except httpx.TransportError:
            await asyncio.sleep(1)
            return None
        if response.status_code == 429 or response.status_code >= 500:
            self.limiter.settle(entry, 0)
            self.limiter.penalize(retry_after(response, 1))
            return None
        reply = response.raise_for_status().json()
        tokens = reply["usage"]["total_tokens"]
        self.limiter.settle(entry, tokens)
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + size
        try:
            answers = json.loads(reply["choices"][0]["message"]["content"])
        except (TypeError, ValueError):
            return {}
        if self.objects:
            rows = answers.get("rows", []) if isinstance(answers, dict) else []
            return {str(row.pop("id", None)): row for row in rows if isinstance(row, dict)}
        return answers if isinstance(answers, dict) else {}


async def main() -> None:
    parser = arguments("asyncio, many rows a call")
    parser.add_argument("--rows-per-request", type=int, default=50)
    parser.add_argument("--tokens", type=int, required=True, help="limit of tokens in a window")
    parser.add_argument("--window", type=float, required=True, help="its length in seconds")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--objects", action="store_true", help="several fields instead of a label")
    args = parser.parse_args()
    rows, n = read_rows(args.rows), args.rows_per_request
    client = Client(args.base_url, Limiter(args.tokens, args.window), args.concurrency, args.answers, args.objects)
    packs = (rows[at : at + n] for at in range(0, len(rows), n))

    async def worker() -> None:
        for pack in packs:  # one iterator for all of them
            await client.fill(pack)

    await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    if client.lost:
        print(f"{client.lost} rows without an answer", file=sys.stderr)


asyncio.run(main())
