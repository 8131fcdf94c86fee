#!/usr/bin/env python3
"""A method of one's own costs one header and one line in the list (DESIGN 1, docs/how-to/add-an-adapter.md).

examples/adapters/tanh_mixture.hpp is such a method. Its header has at most 100 lines of code, and no other code names it but
one line of examples/adapters/list.hpp: tests, GPU suite, bench, demo and files know it from there. So it is with every header
of that folder.
"""

import re
import sys

from sources import ROOT, code_only, finish, shown

LINES = 100
FOLDER = ROOT / "examples" / "adapters"
LIST = FOLDER / "list.hpp"
# Not what a program wrote: bench/results, bench/peers/results.
CODE = {".hpp", ".cpp", ".cuh", ".cu", ".in", ".cmake", ".txt", ".py", ""}


def names_of(text):
    """The namespaces, classes and aliases that a header declares, long enough to be its own."""
    found = re.findall(r"\b(?:namespace|struct|class|using)\s+([A-Za-z_]\w{6,})\b", code_only(text))
    return {name for name in found if name not in ("precision", "element", "rebind", "loramix")}


def main():
    problems, sizes = [], []
    sources = [p for folder in ("bench", "cmake", "examples", "include", "tests") for p in sorted((ROOT / folder).rglob("*"))
               if p.is_file() and p.suffix in CODE and "results" not in p.parts] + [ROOT / "dev", ROOT / "CMakeLists.txt"]
    for header in sorted(FOLDER.glob("*.hpp")):
        if header == LIST:
            continue
        text = header.read_text()
        count = sum(1 for line in code_only(text).splitlines() if line.strip())
        sizes.append(f"{header.name} {count}")
        if count > LINES:
            problems.append(f"{shown(header)}: {count} lines of code, the limit is {LINES}")
        own = names_of(text) | {header.stem}
        mention = re.compile(r"\b(" + "|".join(map(re.escape, sorted(own))) + r")\b")
        listed = 0
        for path in sources:
            if path == header or path.name == "made_up.py":
                continue
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if not mention.search(line):
                    continue
                if path == LIST:
                    listed += 1
                else:
                    problems.append(f"{shown(path)}:{number}: names {shown(header)}: {line.strip()}")
        if listed != 1:
            problems.append(f"{shown(LIST)}: {listed} lines name {shown(header)}, it must be one")
    if not sizes:
        problems.append(f"{shown(FOLDER)}: no method of one's own")
    return finish(problems, f"lines of code: {', '.join(sizes)}; one line in the list, nothing else")


if __name__ == "__main__":
    sys.exit(main())
