"""What the scripts share that the extension is compared with: their arguments, rows in, answers out."""

import argparse
import json
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import httpx

MODEL = "fake"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("base_url")
    parser.add_argument("rows", help="file with a JSON array [id, text] a line")
    parser.add_argument("answers", help="file to write: id, tab, label")
    return parser


def read_rows(path: str) -> list[tuple[int, str]]:
    with open(path, encoding="utf-8") as file:
        return [(number, text) for number, text in map(json.loads, file)]


def writer(path: str) -> Callable[[int, str], None]:
    """A function that writes one answer at once, so that nothing paid for is lost with the process."""
    file = open(path, "w", encoding="utf-8", buffering=1)
    return lambda number, label: print(number, label, sep="\t", file=file)


def retry_after(response: httpx.Response, default: float) -> float:
    """Seconds to wait, as the provider says, or the default."""
    headers = response.headers
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        return float(headers["retry-after"])
    except KeyError:
        return default
    except ValueError:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
