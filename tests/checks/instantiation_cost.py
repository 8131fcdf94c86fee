#!/usr/bin/env python3
"""What using the CPU backend costs a translation unit: CPU seconds to compile, code, and micro-kernels in the object.

Seconds and code are above those of a unit that only includes the ops and the backend. The rule behind it: micro-kernels
are instantiated per scalar and register tile, never per gate: a unit that trains six adapters must hold exactly as many as
one that trains LoRA.

  instantiation_cost.py          the units that the rule is about
  instantiation_cost.py --all    and those of one op and scalar
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from sources import INCLUDE, finish

PRELUDE = """#include <loramix/core/scalars.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/gate/gates.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>
namespace lm = loramix;
using lm::Space;
template <class T> using Shrink = lm::Shrink<T, T, lm::accumulation_t<T>, lm::accumulation_t<T>, Space::host>;
template <class T>
using Expand = lm::Expand<lm::accumulation_t<T>, T, T, lm::accumulation_t<T>, Space::host, lm::Major::column>;
template <class T>
using ShrinkBackward =
    lm::ShrinkBackward<T, T, lm::accumulation_t<T>, lm::accumulation_t<T>, lm::accumulation_t<T>, Space::host>;
template <class T>
using ExpandBackward = lm::ExpandBackward<lm::accumulation_t<T>, T, T, lm::accumulation_t<T>, lm::accumulation_t<T>,
                                          Space::host, lm::Major::column>;
template <class Op> void run(const Op& op, lm::Arena<> work) { lm::execute(lm::cpu::Backend{}, op, work); }
"""
FORWARD = "template void run(const Shrink<{0}>&, lm::Arena<>);\ntemplate void run(const Expand<{0}>&, lm::Arena<>);\n"
BACKWARD = FORWARD + "template void run(const ShrinkBackward<{0}>&, lm::Arena<>);\ntemplate void run(const ExpandBackward<{0}>&, lm::Arena<>);\n"
STEP = """
template <class A>
void step(const A& adapter, lm::MatrixView<const float> x, lm::MatrixView<float> y, lm::MatrixView<float> dx,
          lm::gradient_t<A>& grad, lm::Arena<> work, lm::Arena<> reserve) {
  const lm::cpu::Backend be;
  auto saved = lm::forward(be, adapter, x, y, work, {.save = &reserve});
  lm::backward(be, adapter, saved, x, lm::MatrixView<const float>(y), dx, grad, work);
}
"""
ADAPTERS = {"Lora": "lora", "LoraMoe": "lora_moe", "Mola": "mola", "HydraLora": "hydra_lora", "TeamLora": "team_lora", "More": "more"}


def steps(*adapters):
    includes = "#include <loramix/adapter/forward.hpp>\n" + "".join(f"#include <loramix/adapter/{ADAPTERS[a]}.hpp>\n" for a in adapters)
    view = "lm::MatrixView<float>"
    return includes + STEP + "".join(
        f"template void step(const lm::{a}<float>&, lm::MatrixView<const float>, {view}, {view}, "
        f"lm::gradient_t<lm::{a}<float>>&, lm::Arena<>, lm::Arena<>);\n" for a in adapters)


ONE, MANY = "LoRA<float>, a training step", "LoRA<float> and five mixtures"
RULE = {ONE: steps("Lora"), MANY: steps(*ADAPTERS)}
PARTS = {
    "forward, float": FORWARD.format("float"),
    "forward and backward, float": BACKWARD.format("float"),
    "forward and backward, bfloat16": BACKWARD.format("lm::bfloat16"),
    "forward and backward, half": BACKWARD.format("lm::half"),
    "float, bfloat16 and half": "".join(BACKWARD.format(t) for t in ("float", "lm::bfloat16", "lm::half")),
    "forward and backward, double (composed)": BACKWARD.format("double"),
}
KERNEL = re.compile(r" [tTwW] .*\b(?:\w*tiles?|dots|stream)<")
# Products of parameters alone (cpu/small_product.hpp): they belong to the adapters that have such, and meet no gate.
SMALL = re.compile(r"\bFewRows<")


def compile_unit(text):
    """(CPU seconds, bytes of code, micro-kernels)"""
    with tempfile.TemporaryDirectory() as folder:
        source, made = pathlib.Path(folder) / "unit.cpp", pathlib.Path(folder) / "unit.o"
        source.write_text(PRELUDE + text)
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-march=native", f"-I{INCLUDE.parent}", "-isystem",
                   "/usr/include/eigen3", "-c", "-o", str(made), str(source)]
        with open(made.with_suffix(".log"), "w+") as log:
            compiler = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, used = os.wait4(compiler.pid, 0)  # what this compiler used: another is at work beside it
            compiler.returncode = os.waitstatus_to_exitcode(status)
            if compiler.returncode != 0:
                log.seek(0)
                raise RuntimeError(log.read())
        return used.ru_utime + used.ru_stime, *measured(made)


def measured(made):
    code = int(subprocess.run(["size", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()[1].split()[0])
    symbols = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    return code, sum(1 for s in symbols if KERNEL.search(s) and not SMALL.search(s) and "[clone .cold]" not in s)


def main():
    kernels = {}
    print(f"{'unit':42} {'CPU s':>6} {'code KB':>8} {'micro-kernels':>14}   (above a unit that only includes)")
    units = {"includes only": "", **(PARTS if "--all" in sys.argv[1:] else {}), **RULE}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        empty = (0, 0, 0)
        for name, (seconds, code, kernels[name]) in zip(units, pool.map(compile_unit, units.values())):
            print(f"{name:42} {seconds - empty[0]:6.1f} {(code - empty[1]) / 1024:8.0f} {kernels[name]:14}", flush=True)
            if name == "includes only":
                empty = seconds, code, 0
    problems = []
    one, many = kernels[ONE], kernels[MANY]
    if one == 0:
        problems.append("no micro-kernel was found: this check looks for the wrong names")
    if one != many:
        problems.append(f"{one} micro-kernels for one adapter, {many} for {len(ADAPTERS)}: a gate reaches the micro-kernels")
    return finish(problems, "micro-kernels do not depend on the gate")


if __name__ == "__main__":
    sys.exit(main())
