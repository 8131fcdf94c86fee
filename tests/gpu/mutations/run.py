#!/usr/bin/env python3
"""Would the GPU suite notice? Applies nine patches, one at a time, to a copy of the headers, and expects each to turn a small
part of the suite (suite.cu) red under the emulator with all of its checks; unpatched it must be green.

  LORAMIX_PTXEMU=… tests/gpu/mutations/run.py [NAME...]
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
GPU = "loramix/gpu/"
# name: (header, as it is, as it would be wrong)
PATCHES = {
    "missing barrier": (GPU + "shrink.cuh", "      wait_copies<stages - 2>();\n      __syncthreads();", "      wait_copies<stages - 2>();"),
    "off-by-one tail": (GPU + "pipeline.cuh", "inside ? m.cols - col : Index{0}", "inside ? m.cols - col - 1 : Index{0}"),
    "wrong stride": (GPU + "pipeline.cuh", "M == Major::row ? v.cols : v.rows, v.stride, aligned};",
                     "M == Major::row ? v.cols : v.rows, M == Major::row ? v.cols : v.rows, aligned};"),
    "uninitialised register tile": (GPU + "shrink.cuh", "total[i] = first ? v :", "total[i] ="),
    "swapped index": (GPU + "math.cuh", "tile.address(row + lane.id % 16, chunk + lane.id / 16)",
                      "tile.address(row + lane.id / 16, chunk + lane.id % 16)"),
    "sums of another row": (GPU + "expand.cuh", "const int row = list[16 * i + lane.g + 8 * r];", "const int row = 16 * i + lane.g + 8 * r;"),
    "another block's sums": (GPU + "shrink.cuh", "kept == s ? *here : __ldcg(from + s * apart)", "kept >= 0 ? *here : __ldcg(from + s * apart)"),
    "a factor lost on the way": (GPU + "shrink.cuh", "if (task.near) *here = task.scale * total;", "if (task.near) *here = total;"),
    "a token twice": (GPU + "token_sum.cuh", "return i < count ? token_at(i) : task.x.rows;", "return token_at(i < count ? i / 2 : 0);"),
}


def compile_object(source, out, include):
    subprocess.run([*(["ccache"] if shutil.which("ccache") else []), "nvcc", "-std=c++20", "-O2", "-diag-suppress", "549", f"-I{include}", f"-I{ROOT}/tests",
                    "-DDOCTEST_CONFIG_SUPER_FAST_ASSERTS", "-gencode", "arch=compute_80,code=compute_80", "-c", source, "-o", out],
                   check=True)


def suite_is_green(folder, include, ptxemu):
    """Builds suite.cu against the headers in `include` and runs it; (exit status is 0, the end of what it said)."""
    compile_object(HERE / "suite.cu", folder / "suite.o", include)
    subprocess.run(["nvcc", "-cudart", "shared", "-arch", "sm_80", folder / "suite.o", folder / "main.o", "-o", folder / "suite", "-lcublas"],
                   check=True)
    settings = {"PTXEMU_RACECHECK": "1", "PTXEMU_INITCHECK": "1", "PTXEMU_ABORT": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([f"{ptxemu}/bin/ptxemu-run", "--preload", folder / "suite"], env=settings, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line or "ptxemu" in line or "assertions" in line]
    return done.returncode == 0, said[0] if said else ""


def main():
    ptxemu = os.environ.get("LORAMIX_PTXEMU")
    if not ptxemu or not shutil.which("nvcc"):
        print("mutations: not run (they need nvcc, and LORAMIX_PTXEMU: the emulator's build directory)")
        return 77
    wanted = sys.argv[1:] or ["unpatched", *PATCHES]
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        include = folder / "include"
        compile_object(ROOT / "tests" / "main.cpp", folder / "main.o", ROOT / "include")
        for name in wanted:
            shutil.copytree(ROOT / "include", include, dirs_exist_ok=True)
            if name != "unpatched":
                header, right, wrong = PATCHES[name]
                text = (include / header).read_text()
                if text.count(right) != 1:
                    sys.exit(f"{name}: {header} does not have its line once: renew the patch")
                (include / header).write_text(text.replace(right, wrong))
            green, said = suite_is_green(folder, include, ptxemu)
            good = green == (name == "unpatched")
            bad += not good
            print(f"{'ok' if good else 'FAILED'}: {name}: {'green' if green else 'red'}  {said.strip()[:140]}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
