"""Asks a local model for the sentiment of three texts in one request, as the extension does: try_model.py PORT"""

import json
import sys
import time
import urllib.request

TEXTS = {417: "What a lovely morning :)", 902: "My bike was stolen again.", 355: "Thanks, that was a great evening!"}
SYSTEM = """These are short texts. Say whether the feeling in each is positive or negative.

Labels: positive, negative

Answer with one JSON object that maps each number to its label, on one line, without spaces."""
SCHEMA = {"type": "object", "additionalProperties": {"type": "string", "enum": ["positive", "negative"]}}


def main():
    body = {
        "model": "local",
        "temperature": 0,
        "max_tokens": 100,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "\n".join(f"{number}: {json.dumps(text)}" for number, text in TEXTS.items())},
        ],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    }
    url = f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    print(answer["choices"][0]["message"]["content"])
    print(f"{answer['usage']['prompt_tokens']} tokens in, {answer['usage']['completion_tokens']} out", end=", ")
    print(f"{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
