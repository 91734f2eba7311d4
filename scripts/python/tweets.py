"""Writes a sample of the VADER tweets as CSV: id, body, rating, human.

usage: tweets.py vaderSentiment-3.3.2.tar.gz OUT.csv [ROWS]

`rating` is the mean of what 20 people or more gave the tweet, from -4 to 4; `human` is what that says:
positive from 0.5 up, negative from -0.5 down; tweets between are left out. Which rows are taken and their
order depend on a hash of the tweet's number alone, so it is the same sample everywhere. Each pair of rows is
a positive and a negative one: every beginning of the table holds as many of one as of the other.
"""

import csv
import hashlib
import io
import sys
import tarfile

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"


def tweets(path):
    with tarfile.open(path) as outer:
        inner = io.BytesIO(outer.extractfile(INNER).read())
    with tarfile.open(fileobj=inner) as archive:
        text = archive.extractfile(TWEETS).read().decode("utf-8", "replace")
    for line in text.splitlines():
        number, rating, body = line.split("\t", 2)
        yield number, float(rating), body.strip()


def main():
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    positive, negative = [], []
    for number, rating, body in tweets(sys.argv[1]):
        order = hashlib.sha256(f"pg_llm_batch {number}".encode()).hexdigest()
        if rating >= 0.5:
            positive.append((order, body, rating, "positive"))
        elif rating <= -0.5:
            negative.append((order, body, rating, "negative"))
    pairs = zip(sorted(positive)[: rows // 2], sorted(negative)[: rows // 2])
    with open(sys.argv[2], "w", newline="", encoding="utf-8") as out:
        # Which of a pair comes first is by chance too: the labels must not follow a pattern.
        chosen = [row for pair in pairs for row in sorted(pair, key=lambda row: row[0][::-1])]
        csv.writer(out).writerows((number, *row[1:]) for number, row in enumerate(chosen, 1))


if __name__ == "__main__":
    main()
