#!/usr/bin/env python3
"""Code in README and docs is a slice of a compiled file (STYLE 6).

    <!-- snippet: examples/engine/main.cpp#forward -->
    ```cpp
    ...
    ```
    <!-- /snippet -->

equals, dedented, what stands between '// [forward]' and '// [/forward]' in that file. '--fix' rewrites the pages. A C++
or CUDA block outside such markers is an error.
"""

import pathlib
import re
import sys
import textwrap

from sources import ROOT, finish, shown

SNIPPET = re.compile(r"<!-- snippet: (?P<path>[^#\s]+)#(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /snippet -->", re.S)
FENCE = re.compile(r"^```(cpp|c\+\+|cuda|cu|hpp)\b", re.M | re.I)


def pages():
    found = [p for p in ROOT.glob("*.md")] + sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))
    return [p for p in found if p.name != "CHANGELOG.md"]


def slice_of(path, name):
    text = (ROOT / path).read_text()
    match = re.search(rf"^[ \t]*// \[{re.escape(name)}\][^\n]*\n(.*?)^[ \t]*// \[/{re.escape(name)}\]", text, re.S | re.M)
    if not match:
        raise LookupError(f"{path} has no slice // [{name}] … // [/{name}]")
    lines = [line for line in match[1].splitlines() if not re.match(r"\s*// \[/?[\w-]+\]", line)]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def fenced(path, name):
    language = "cuda" if pathlib.Path(path).suffix in (".cu", ".cuh") else "cpp"
    if pathlib.Path(path).suffix == ".txt":
        language = "cmake"
    return f"```{language}\n{slice_of(path, name)}\n```\n"


def main():
    fix = "--fix" in sys.argv[1:]
    problems, count = [], 0
    for page in pages():
        text = page.read_text()

        def renewed(match):
            nonlocal count
            count += 1
            try:
                body = fenced(match["path"], match["name"])
            except (LookupError, OSError) as error:
                problems.append(f"{shown(page)}: {error}")
                return match[0]
            if body != match["body"] and not fix:
                line = text.count("\n", 0, match.start()) + 1
                problems.append(f"{shown(page)}:{line}: differs from {match['path']}#{match['name']} (tests/checks/snippets.py --fix)")
            return f"<!-- snippet: {match['path']}#{match['name']} -->\n{body}<!-- /snippet -->"

        new = SNIPPET.sub(renewed, text)
        if fix and new != text:
            page.write_text(new)
            print(f"rewrote {shown(page)}")
        for match in FENCE.finditer(SNIPPET.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)):
            line = text.count("\n", 0, match.start()) + 1
            problems.append(f"{shown(page)}:{line}: a code block that is no slice of a compiled file")
    return finish(problems, f"{count} snippets equal their compiled slices")


if __name__ == "__main__":
    sys.exit(main())
