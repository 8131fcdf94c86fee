"""Timing that survives a machine that drifts: everything compared is called in the same rounds, in shuffled order, and
only ratios within a round are kept. The Python twin of include/loramix/bench/rounds.hpp."""
import contextlib
import gc
import math
import random
import resource
import statistics
import subprocess
import time

SAMPLE = 3e-3   # seconds that one sample lasts at least
WARMED = 1e-2   # seconds per call below which an untimed call goes before each sample
SLOW = 5e-2     # seconds per call from which half of the rounds do
SLOWEST = 0.3   # and a sixth
SLICE = 40.0    # seconds for which `hold` is held at a time


class Hold:
    """Holds a command while rounds are timed, a slice of them at a time: one that keeps others off the cores, say. It is
    called as COMMAND sh -c '…' and must run that; None: nothing."""

    def __init__(self, command):
        self.command = command

    @contextlib.contextmanager
    def held(self):
        if not self.command:
            yield
            return
        pipe = subprocess.PIPE
        process = subprocess.Popen([*self.command, "sh", "-c", "echo held; read _"], stdin=pipe, stdout=pipe, text=True)
        try:
            if process.stdout.readline().strip() != "held":
                raise RuntimeError(f"{self.command} does not run what it is given")
            yield
        finally:
            process.stdin.close()
            process.wait()


def preemptions():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def seconds_of(call, calls):
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def sample(call, calls):
    """The first undisturbed one of four samples, or else the fastest."""
    fastest = math.inf
    for _ in range(4):
        before = preemptions()
        seconds = seconds_of(call, calls)
        if preemptions() == before:
            return seconds
        fastest = min(fastest, seconds)
        if seconds > 0.02:
            break
    return fastest


def spread(rounds, n):
    """n of the rounds, evenly."""
    return [r for i, r in enumerate(rounds) if i * n // len(rounds) != (i + 1) * n // len(rounds)]


def interleave(contenders, rounds, hold):
    """{name: [seconds per call, or None where a slow one sat a round out]} for {name: call}."""
    seconds = {name: [None] * rounds for name in contenders}
    slow = spread(range(rounds), max(1, rounds // 2))
    slowest = spread(slow, max(1, rounds // 6))  # they meet the slow ones, and those all
    order, shuffle = list(contenders), random.Random(7).shuffle
    gc.collect()
    gc.disable()
    try:
        with hold.held():
            for call in contenders.values():
                call()
            estimate = {name: max(1e-7, seconds_of(call, 1)) for name, call in contenders.items()}
        done = 0
        while done < rounds:
            begin = time.monotonic()
            with hold.held():
                while done < rounds and time.monotonic() - begin < SLICE:
                    shuffle(order)
                    for name in order:
                        if estimate[name] > SLOW and done not in slow or estimate[name] > SLOWEST and done not in slowest:
                            continue
                        call = contenders[name]
                        if estimate[name] < WARMED:
                            call()
                        got = sample(call, max(1, math.ceil(SAMPLE / estimate[name])))
                        seconds[name][done] = got
                        estimate[name] = min(estimate[name], got)
                    done += 1
    finally:
        gc.enable()
    return seconds


def ratio(of, over):
    """Median, minimum, interquartile range and number of per-round ratios."""
    ratios = sorted(a / b for a, b in zip(of, over) if a is not None and b is not None)
    quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"ratio_median": statistics.median(ratios), "ratio_min": ratios[0], "spread": quarter[2] - quarter[0],
            "rounds": len(ratios)}
