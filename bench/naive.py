"""The script that everybody writes first: threads, one row a call, and what the provider says about waiting is heeded."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from client import MODEL, arguments, read_rows, retry_after, writer
from tickets import LABELS, SYSTEM_SINGLE

THREADS = 20
TRIES = 50


def main() -> None:
    args = arguments(__doc__).parse_args()
    write = writer(args.answers)
    http = httpx.Client(base_url=args.base_url, timeout=60, limits=httpx.Limits(max_connections=THREADS))

    def ask(row: tuple[int, str]) -> bool:
        number, text = row
        body = {"model": MODEL, "messages": [{"role": "system", "content": SYSTEM_SINGLE},
                                             {"role": "user", "content": f"Ticket:\n{text}"}]}
        for tried in range(TRIES):
            pause = min(0.5 * 2**tried, 10)
            try:
                response = http.post("/chat/completions", json=body)
            except httpx.TransportError:
                time.sleep(pause)
                continue
            if response.status_code == 429 or response.status_code >= 500:
                time.sleep(retry_after(response, pause))
                continue
            label = response.raise_for_status().json()["choices"][0]["message"]["content"].strip()
            if label in LABELS:
                write(number, label)
                return True
        return False

    with ThreadPoolExecutor(THREADS) as pool:
        lost = sum(not good for good in pool.map(ask, read_rows(args.rows)))
    if lost:
        print(f"{lost} rows without an answer", file=sys.stderr)


main()
