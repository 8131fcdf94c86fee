"""What the checks share: where the headers are, and C++ without its comments."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include" / "loramix"

# Rooms in the order in which they may include one another; cpu and gpu stand aside (DESIGN 2).
ROOMS = ["core", "gate", "ops", "router", "adapter", "train", "io"]
BACKENDS = ["cpu", "gpu"]


def headers(*rooms):
    """Public headers, all of them or those of some rooms, sorted."""
    found = sorted(p for p in INCLUDE.rglob("*") if p.suffix in (".hpp", ".cuh"))
    return [p for p in found if not rooms or room(p) in rooms]


def room(header):
    """The room of a header: its first folder below loramix/, or '' for an umbrella."""
    parts = header.relative_to(INCLUDE).parts
    return parts[0] if len(parts) > 1 else ""


def is_detail(header):
    return "detail" in header.relative_to(INCLUDE).parts[:-1]


def shown(path):
    return str(path.relative_to(ROOT))


_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\'', re.S)


def blank(match):
    """The same length and the same line breaks, nothing else."""
    return re.sub(r"[^\n]", " ", match[0])


def code_only(text):
    """The text with comments and literals blanked; positions and lines stay."""
    return _TOKEN.sub(blank, text)


def finish(problems, good):
    """Prints and returns an exit status."""
    for problem in problems:
        print(problem)
    if not problems:
        print(good)
    return 1 if problems else 0
