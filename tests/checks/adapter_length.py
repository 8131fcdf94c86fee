#!/usr/bin/env python3
"""An adapter header of more than 100 lines of code (at most 120 columns each) means an op is missing (STYLE 2)."""

import re
import sys

from sources import code_only, finish, headers, shown

LINES, COLUMNS = 100, 120
ADAPTER = re.compile(r"\bkind = \"")


def main():
    problems, sizes = [], []
    for path in headers("adapter"):
        text = path.read_text()
        if not ADAPTER.search(text):
            continue  # what all adapters share: forward, initialise, merge
        count = sum(1 for line in code_only(text).splitlines() if line.strip())
        sizes.append(f"{path.name} {count}")
        if count > LINES:
            problems.append(f"{shown(path)}: {count} lines of code, the limit is {LINES}")
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > COLUMNS:
                problems.append(f"{shown(path)}:{number}: {len(line)} columns, the limit is {COLUMNS}")
    return finish(problems, "lines of code: " + (", ".join(sizes) or "no adapter yet"))


if __name__ == "__main__":
    sys.exit(main())
