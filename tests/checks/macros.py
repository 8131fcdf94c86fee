#!/usr/bin/env python3
"""The macro budget (STYLE 14) and the order of the rooms (DESIGN 2).

Two public macros, both in core/config.hpp; every conditional in that file too; macros named LORAMIX_DETAIL_ only there.
No unfinished-work words in what we ship. A room includes only rooms above it; Eigen stays in cpu/, nlohmann/json in io/.
"""

import re
import sys

from sources import BACKENDS, INCLUDE, ROOMS, ROOT, code_only, finish, headers, room, shown

PUBLIC = {"LORAMIX_ABI", "LORAMIX_HD"}
CONFIG = INCLUDE / "core" / "config.hpp"
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def check_directives(path, text):
    # Literals are blanked, so an #include "..." keeps its directive and loses its name: it is read elsewhere.
    for number, line in enumerate(code_only(text).splitlines(), 1):
        directive = re.match(r"\s*#\s*(\w+)\s*(\w+)?", line)
        if not directive or path == CONFIG:
            continue
        if directive[1] in ("if", "ifdef", "ifndef", "elif", "else", "endif", "define", "undef"):
            yield f"{shown(path)}:{number}: #{directive[1]} outside core/config.hpp"


def allowed(from_room, to_room):
    if from_room in ("", "bench"):
        return True
    if from_room == to_room:
        return True
    if from_room in BACKENDS:
        return to_room in ("core", "gate", "ops")
    return to_room in ROOMS and ROOMS.index(to_room) < ROOMS.index(from_room)


def check_includes(path, text):
    here = room(path)
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
        if not match:
            continue
        name = match[1]
        where = f"{shown(path)}:{number}:"
        if name.startswith("loramix/"):
            target = INCLUDE / name.removeprefix("loramix/")
            if not target.exists():
                yield f"{where} includes {name}, which does not exist"
            elif here in ROOMS + BACKENDS + ["bench", ""] and not allowed(here, room(target)):
                yield f"{where} {here}/ may not include {room(target) or 'an umbrella'}/ ({name})"
            if target.suffix == ".cuh" and path.suffix != ".cuh":
                yield f"{where} a .hpp includes a .cuh ({name})"
        elif re.match(r"(unsupported/)?Eigen/", name) and here != "cpu":
            yield f"{where} Eigen outside cpu/"
        elif name.startswith("nlohmann/") and here != "io":
            yield f"{where} nlohmann/json outside io/"
        elif name.startswith("benchmark/") and here != "bench":
            yield f"{where} Google Benchmark outside bench/"
        elif re.match(r"(cub|thrust)/", name) and path.name != "plan_cub.cuh":  # which nothing includes
            yield f"{where} CUB or Thrust in a default header (3 to 8 s)"
        elif re.match(r"cu(da|blas)", name) and here != "gpu":
            yield f"{where} CUDA outside gpu/ ({name})"
        elif name.startswith('"'):
            yield f"{where} use <loramix/...>"


def main():
    problems = []
    config = CONFIG.read_text()
    defined = set(re.findall(r"^\s*#\s*define\s+(\w+)", config, re.M))
    public = {name for name in defined if not name.startswith("LORAMIX_DETAIL_")}
    if public != PUBLIC:
        problems.append(f"{shown(CONFIG)}: public macros are {sorted(public)}, the budget is {sorted(PUBLIC)}")
    for path in headers():
        text = path.read_text()
        problems += check_directives(path, text)
        problems += check_includes(path, text)
    for folder in ("include", "examples", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".hpp", ".cuh", ".cpp", ".cu", ".py"):
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    if UNFINISHED.search(line):
                        problems.append(f"{shown(path)}:{number}: unfinished: {line.strip()}")
    return finish(problems, f"public macros: {', '.join(sorted(public))}; {len(defined) - len(public)} internal ones, all in "
                            "core/config.hpp; rooms include only what stands above them")


if __name__ == "__main__":
    sys.exit(main())
