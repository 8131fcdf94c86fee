#!/usr/bin/env python3
"""symbols.py A.o B.o: fails when two units built for different instruction sets define the same loramix or Eigen symbol.

Weak symbols of the standard library are shared too (std::vector's, say). They are listed, not refused: which of them
exist depends on the optimiser, and a library cannot rename std.
"""

import re
import subprocess
import sys


def defined(path):
    text = subprocess.run(["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True).stdout
    return {line.split()[2] for line in text.splitlines() if line.split()[1] in "TWVuDBR"}


def demangle(symbols):
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def main():
    first, second = (defined(path) for path in sys.argv[1:3])
    ours = {s for s in first | second if re.search(r"loramix|Eigen", s)}
    if not ours & first or not ours & second:
        return "no symbol of loramix or Eigen in one of the units: the comparison would prove nothing"
    shared = sorted(first & second)
    bad = [s for s in shared if s in ours]
    other = [s for s in shared if s not in ours]
    print(f"{len(first)} and {len(second)} symbols, {len(bad)} of loramix or Eigen shared, {len(other)} of the standard library")
    for name in demangle(other):
        print("  shared:", name[:160])
    if bad:
        return "shared between instruction sets:\n  " + "\n  ".join(demangle(bad))
    return None


if __name__ == "__main__":
    sys.exit(main())
