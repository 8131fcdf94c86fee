#!/usr/bin/env python3
"""Measures one case in this process and prints its rows as lines of JSON; bench/peers/run calls it.

  measure.py KERNELS CASE ALLOCATOR [--rounds N] [--hold COMMAND] [--peer NAME]...
"""
import argparse
import json
import statistics
import sys
import traceback

import torch

import cases
import forms
import ours
import problem
import rounds

THREADS = (1, 2)


def contenders(library, case, p, threads, train, wanted):
    """[(name, step)], ours twice and first; {name: why not}."""
    mine = ours.ours(library, p, threads, train)
    steps, refused = [("ours", mine), ("A/A", mine)], dict(case.left_out)
    for name in case.peers:
        if wanted and name not in wanted:
            continue
        for variant, make in enumerate(forms.FORMS[case.kind][name]):
            if train and not getattr(make, "trains", True):
                refused[name] = "inference only"
            elif case.rank_of and len(set(case.rank_of)) > 1 and getattr(make, "equal_ranks", False):
                continue
            else:
                steps.append((f"{name}#{variant}", make(p, train)))
    return steps, refused


def rows(library, case, p, threads, train, wanted, count, hold):
    torch.set_num_threads(threads)
    steps, refused = contenders(library, case, p, threads, train, wanted)
    expected = None
    for name, step in steps:
        if name == "A/A":
            continue
        got = step.fresh()
        if expected is None or case.dropout > 0:  # everyone draws a mask of their own
            p.kept = step.kept
            expected = p.expected(train)
        problem.check(f"{case.name}, {name}", got, expected, p.tolerance)
    del expected, got
    seconds = rounds.interleave(dict(steps), count, hold)
    milliseconds = {name: 1e3 * statistics.median(s for s in seconds[name] if s is not None) for name, _ in steps}
    best = {}
    for name, _ in steps[1:]:
        measured = rounds.ratio(seconds[name], seconds["ours"])
        peer = name.split("#")[0]
        if peer not in best or measured["ratio_median"] < best[peer]["ratio_median"]:
            best[peer] = {"peer": peer, **measured, "ours_ms": milliseconds["ours"], "peer_ms": milliseconds[name]}
    return [*best.values(), *({"peer": name, "not_run": why} for name, why in refused.items())]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels")
    parser.add_argument("case")
    parser.add_argument("allocator")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--hold", default="")
    parser.add_argument("--peer", action="append", default=[])
    arguments = parser.parse_args()
    case = next(c for c in cases.CASES if c.name == arguments.case)
    library, hold = ours.Library(arguments.kernels), rounds.Hold(arguments.hold.split())
    torch.manual_seed(7)
    p = problem.problem_of(case)
    for passes in case.passes:
        for threads in THREADS:
            common = {"case": case.name, "pass": passes, "threads": threads, "allocator": arguments.allocator}
            try:
                if case.scalar == "bfloat16" and not library.c.loramix_amx():
                    found = [{"peer": "all", "not_run": "bfloat16 is compared on processors with AMX, and this is none"}]
                else:
                    found = rows(library, case, p, threads, passes == "train", arguments.peer, arguments.rounds, hold)
            except Exception as error:  # a row says why it is missing; the others go on
                traceback.print_exc()
                found = [{"peer": cases.FAILED, "not_run": f"{type(error).__name__}: {error}"}]
            for row in found:
                print(json.dumps(common | row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
