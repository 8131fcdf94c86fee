#!/usr/bin/env python3
"""Builds small programs against loramix the ways users do, and checks that no target drags in what it does not need.

find_package on an installed prefix (per component, with the other components' packages disabled), add_subdirectory, and
FetchContent from a local tree without network. No -march, -W or -fopenmp may reach a consumer.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "consumer"
# Packages that a consumer of one component must be able to do without.
OTHERS = {
    "core": ["Eigen3", "OpenMP", "CUDAToolkit", "nlohmann_json", "benchmark"],
    "cpu": ["OpenMP", "CUDAToolkit", "nlohmann_json", "benchmark"],
    "openmp": ["CUDAToolkit", "nlohmann_json", "benchmark"],
    "io": ["Eigen3", "OpenMP", "CUDAToolkit", "benchmark"],
    "gpu": ["Eigen3", "OpenMP", "nlohmann_json", "benchmark"],
}
LEAKS = re.compile(r"(?<=\s)(-march\S*|-mavx\S*|-W\S+|-O\d|-ffast-math|--expt\S*|--extended-lambda|-D\S+)")


class Failed(Exception):
    pass


def run(*command, expect=None):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    text = done.stdout + done.stderr
    if expect is not None:
        if done.returncode == 0 or " ".join(expect.split()) not in " ".join(text.split()):
            raise Failed(f"{' '.join(map(str, command))}\nmust fail with: {expect}\n{text}")
    elif done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}\n{text}")
    return text


def disabled(packages):
    return [f"-DCMAKE_DISABLE_FIND_PACKAGE_{p}=ON" for p in packages]


def consume(name, project, components, *options):
    """Configures, builds and runs one consumer; returns its compile commands."""
    build = BUILD / name
    shutil.rmtree(build, ignore_errors=True)
    launcher = [f"-DCMAKE_{l}_COMPILER_LAUNCHER=ccache" for l in ("CXX", "CUDA") if shutil.which("ccache")]
    run("cmake", "-G", "Ninja", "-S", HERE / project, "-B", build, f"-DCONSUMER_COMPONENTS={';'.join(components)}", *launcher, *options)
    run("cmake", "--build", build)
    run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=ignore")
    commands = json.loads((build / "compile_commands.json").read_text())
    for entry in commands:
        leaks = LEAKS.findall(entry["command"])
        if "-fopenmp" in entry["command"] and "openmp" not in components:
            leaks.append("-fopenmp")
        if leaks:
            raise Failed(f"{name}: reaches the consumer: {' '.join(leaks)}\n  {entry['command']}")
    print(f"  {name}: {', '.join(components)}")


def main():
    nvcc = shutil.which("nvcc") is not None
    host = ["core", "cpu", "openmp", "io"]
    prefix = BUILD / "prefix"
    shutil.rmtree(BUILD, ignore_errors=True)
    try:
        run("cmake", "--install", ROOT / "build" / "dev", "--prefix", prefix)
        headers = {p.relative_to(ROOT / "include") for p in (ROOT / "include").rglob("*") if p.suffix in (".hpp", ".cuh")}
        installed = {p.relative_to(prefix / "include") for p in (prefix / "include").rglob("*") if p.is_file()}
        if headers != installed:
            raise Failed(f"installed headers differ from include/: {sorted(map(str, headers ^ installed))}")
        print(f"  installed: {len(installed)} headers")

        found = f"-DCMAKE_PREFIX_PATH={prefix}"
        for component in host + (["gpu"] if nvcc else []):
            consume(f"package-{component}", "find_package", [component], found, *disabled(OTHERS[component]))
        run("cmake", "-G", "Ninja", "-S", HERE / "find_package", "-B", BUILD / "package-lacking", "-DCONSUMER_COMPONENTS=cpu", found,
            *disabled(["Eigen3"]), expect="component cpu needs Eigen3, which was not found")
        run("cmake", "-G", "Ninja", "-S", HERE / "find_package", "-B", BUILD / "package-unknown", "-DCONSUMER_COMPONENTS=tpu", found,
            expect="component tpu is unknown")
        print("  a missing dependency and an unknown component are named")
        consume("subdirectory", "add_subdirectory", host, f"-DLORAMIX_SOURCE={ROOT}")
        consume("subdirectory-core", "add_subdirectory", ["core"], f"-DLORAMIX_SOURCE={ROOT}", *disabled(OTHERS["core"]))
        consume("fetch", "fetch_content", host, f"-DFETCHCONTENT_SOURCE_DIR_LORAMIX={ROOT}", "-DFETCHCONTENT_FULLY_DISCONNECTED=ON")
        if not nvcc:
            print("GPU: not run (nvcc not found)")
    except Failed as failure:
        print(failure)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
