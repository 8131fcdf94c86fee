#!/usr/bin/env python3
"""cuda_includes.py BUILD: no CUDA unit of that build reads a cpu/ header or Eigen (their packet types differ between
nvcc's passes), as ninja recorded when it compiled them."""

import re
import subprocess
import sys

from sources import finish


def main():
    build = sys.argv[1]
    text = subprocess.run(["ninja", "-C", build, "-t", "deps"], capture_output=True, text=True, check=True).stdout
    units, problems = 0, []
    for block in re.split(r"\n(?=\S)", text):
        target = block.split(":", 1)[0]
        if not target.endswith(".cu.o"):
            continue
        units += 1
        strange = re.search(r"\S*(?:loramix/cpu/|/Eigen/)\S*", block)
        if strange:
            problems.append(f"{target}: includes {strange[0]}")
    if units == 0:
        problems.append(f"no CUDA unit was built in {build}")
    return finish(problems, f"{units} CUDA units include neither cpu/ nor Eigen")


if __name__ == "__main__":
    sys.exit(main())
