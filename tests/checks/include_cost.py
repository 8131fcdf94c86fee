#!/usr/bin/env python3
"""What including a room costs, in CPU seconds above an empty file (STYLE 10): printed, with two budgets.

core/ ≤ 0.25 s (g++), all of gpu/*.cuh ≤ 1.5 s (nvcc, one virtual target). Machines are noisy, so only twice the budget
fails; the least of several runs counts.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from sources import BACKENDS, INCLUDE, ROOMS, finish, headers, is_detail

BUDGET = {"core": 0.25, "gpu (.cuh)": 1.5}
RUNS = 5
# Headers that no other header includes, each for those who ask for it.
OPT_IN = {"openmp.hpp", "thread_pool.hpp", "amx.hpp", "plan_cub.cuh"}


def cpu_seconds(command):
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return after.children_user - before.children_user + after.children_system - before.children_system


def cost(folder, command, suffix, paths, runs):
    file = pathlib.Path(folder) / f"umbrella{suffix}"
    file.write_text("".join(f"#include <loramix/{p.relative_to(INCLUDE)}>\n" for p in paths))
    return min(cpu_seconds([*command, str(file)]) for _ in range(runs))


def available(room):
    return room != "io" or pathlib.Path("/usr/include/nlohmann/json.hpp").exists()


def main():
    problems = []
    include = f"-I{INCLUDE.parent}"
    gcc = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", include, "-isystem", "/usr/include/eigen3"]
    nvcc = ["nvcc", "-std=c++20", "-arch=compute_80", "-c", "-o", "/dev/null", include]
    groups = []
    for room in ROOMS + ["cpu"]:
        if available(room):
            paths = [p for p in headers(room) if p.suffix == ".hpp" and not is_detail(p) and p.name not in OPT_IN]
            groups.append((room, gcc, ".cpp", paths, RUNS))
    cuh = [p for p in headers() if p.suffix == ".cuh" and not is_detail(p) and p.name not in OPT_IN]
    if shutil.which("nvcc"):
        groups.append(("gpu (.cuh)", nvcc, ".cu", cuh, 2))
    else:
        print("GPU: not run (nvcc not found)")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for room, command, suffix, paths, runs in groups:
            if not paths:
                continue
            try:
                empty = cost(folder, command, suffix, [], runs)
                rows.append((room, len(paths), cost(folder, command, suffix, paths, runs) - empty))
            except RuntimeError as error:
                problems.append(str(error))
    for room, count, seconds in rows:
        budget = BUDGET.get(room)
        print(f"{room:12} {count:3} headers  {seconds:6.2f} s above an empty file" + (f"  (budget {budget} s)" if budget else ""))
        if budget and seconds > 2 * budget:
            problems.append(f"{room}: {seconds:.2f} s is more than twice the budget of {budget} s")
    return finish(problems, "include cost within budget")


if __name__ == "__main__":
    sys.exit(main())
