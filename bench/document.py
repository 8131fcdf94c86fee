#!/usr/bin/env python3
"""docs/benchmarks.md from results that are checked in: what stands between its markers is written anew.

  bench/document.py      the newest of bench/results/*.json and bench/peers/results/*.json
"""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "peers")]

import report  # noqa: E402
import summary  # noqa: E402


def newest(folder):
    return sorted(folder.glob("*.json"))[-1]


def short(name):
    return name.replace("/iterations:1", "").replace("/manual_time", "")


def between(text, name, content):
    marked = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- /results -->)", re.S)
    if not marked.search(text):
        sys.exit(f"docs/benchmarks.md has no place for '{name}'")
    return marked.sub(lambda m: m[1] + content.strip() + "\n" + m[2], text)


def main():
    page = ROOT / "docs" / "benchmarks.md"
    classes, peers = newest(ROOT / "bench" / "results"), newest(ROOT / "bench" / "peers" / "results")
    rows = json.loads(peers.read_text())
    text = between(page.read_text(), "classes", summary.summary(json.loads(classes.read_text())["benchmarks"], short))
    text = between(text, "peers", report.markdown(rows))
    page.write_text(text)
    (ROOT / "docs" / "pictures" / "peers.svg").write_text(report.plot(rows))
    print(f"docs/benchmarks.md: {classes.name}, {peers.name}")


if __name__ == "__main__":
    main()
