#!/usr/bin/env python3
"""nvcc compiles every CUDA header, and the products of an adapter with them, without a warning for each architecture that we
name: ptxas and the host compiler included."""

import pathlib
import subprocess
import sys
import tempfile

from sources import INCLUDE, ROOT, finish, headers

ARCHITECTURES = ("80", "90", "100", "120")
UNIT = ROOT / "bench" / "gpu" / "counters.cu"  # all kernels of the product, in four scalars


def main():
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        umbrella = pathlib.Path(folder) / "umbrella.cu"
        umbrella.write_text("".join(f"#include <loramix/{h.relative_to(INCLUDE)}>\n" for h in headers() if h.suffix == ".cuh"))
        for arch in ARCHITECTURES:
            for unit in (umbrella, UNIT):
                done = subprocess.run(["nvcc", "-std=c++20", "-O2", f"-I{INCLUDE.parent}", "-Xcompiler", "-Wall,-Wextra",
                                       "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", unit, "-o", f"{folder}/unit.o"],
                                      capture_output=True, text=True)
                said = (done.stdout + done.stderr).strip()
                if done.returncode != 0 or said:
                    problems.append(f"sm_{arch}, {unit.name}:\n{said}")
    return finish(problems, f"no warning for {', '.join('sm_' + a for a in ARCHITECTURES)}")


if __name__ == "__main__":
    sys.exit(main())
