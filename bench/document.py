#!/usr/bin/env python3
"""docs/benchmarks.md from results that are checked in: what stands between its markers is written anew.

  bench/document.py

A marker names what is written and the file that it is of:
  classes FILE   bench/summary.py's tables of a run of the benchmarks
  adapters FILE  its table of every adapter
  peers FILE     bench/peers/report.py's whole report; its plot goes to docs/pictures/peers.svg
  goals FILE     the report's first table only
"""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "peers")]

import report  # noqa: E402
import summary  # noqa: E402

MARKED = re.compile(r"(<!-- results: (\w+) (\S+) -->\n).*?(<!-- /results -->)", re.S)


def short(name):
    return name.replace("/iterations:1", "").replace("/manual_time", "")


def written(what, results):
    rows = json.loads((ROOT / results).read_text())
    if what == "classes":
        return summary.summary(rows["benchmarks"], short)
    if what == "adapters":
        return summary.summary_of_adapters(rows["benchmarks"], short)
    if what == "goals":
        return "\n".join(report.goals(rows))
    if what == "peers":
        (ROOT / "docs" / "pictures" / "peers.svg").write_text(report.plot(rows))
        return report.markdown(rows)
    sys.exit(f"docs/benchmarks.md: no such thing as '{what}'")


def main():
    page = ROOT / "docs" / "benchmarks.md"
    text, places = MARKED.subn(lambda m: f"{m[1]}{written(m[2], m[3]).strip()}\n{m[4]}", page.read_text())
    page.write_text(text)
    print(f"docs/benchmarks.md: {places} places")


if __name__ == "__main__":
    main()
