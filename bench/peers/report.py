"""What peers.json says, for people: goals and whether they are met, tables (Markdown) and a plot (SVG). Standard library."""
import math
import statistics
from xml.sax.saxutils import escape

from cases import CASES

CASE = {case.name: case for case in CASES}
PEERS = ["addmm", "torch.compile", "addmm per expert", "loop", "gather loop", "sorted", "per-token gather", "class", "MOELoRA",
         "X-LoRA", "PEFT", "PEFT mixed batch", "low-rank form"]


def measured(rows):
    return [r for r in rows if "ratio_median" in r]


def of_peers(rows):
    return [r for r in measured(rows) if r["peer"] != "A/A"]


def plain(case):
    """One product with an open or dense gate, float, no dropout."""
    return case.kind in ("lora", "dense", "team") and case.scalar == "float32" and case.dropout == 0


def top2(case):
    return case.kind == "top_k" and case.experts == 8 and case.tokens >= 256


# (what, peers, allocator, pass or None, which cases, at least)
GOALS = [
    ("addmm, dense forward, T ≥ 256", ("addmm",), "default", "forward", lambda c: plain(c) and c.tokens >= 256, 1.2),
    ("addmm, dense training, T ≥ 256", ("addmm",), "default", "train", lambda c: plain(c) and c.tokens >= 256, 1.3),
    ("addmm, T = 16", ("addmm",), "default", None, lambda c: plain(c) and c.tokens == 16, 1.5),
    ("addmm, T = 1, cold weights", ("addmm",), "default", None, lambda c: plain(c) and c.tokens == 1, 1.2),
    ("addmm, top-2 of 8, T ≥ 256", ("addmm",), "default", None, top2, 2.2),
    ("addmm, one shared A", ("addmm",), "default", None, lambda c: c.kind == "shared", 1.2),
    ("addmm, bfloat16, forward", ("addmm",), "default", "forward", lambda c: c.scalar == "bfloat16", 1.2),
    ("addmm, bfloat16, training", ("addmm",), "default", "train", lambda c: c.scalar == "bfloat16", 1.2),
    ("classes and X-LoRA, dense, T ≥ 256", ("class", "MOELoRA", "X-LoRA"), "warm", None, lambda c: c.kind == "dense" and c.tokens >= 256, 5),
    ("loop, dense, T ≥ 256", ("loop",), "warm", None, lambda c: c.kind == "dense" and c.scalar == "float32" and c.tokens >= 256, 4),
    ("class, top-2 of 8, T ≥ 256", ("class",), "warm", None, top2, 4),
    ("gather loop and sorted, top-2 of 8, T ≥ 256", ("gather loop", "sorted"), "warm", None, top2, 2.5),
    ("PEFT's layer, T ≥ 256", ("PEFT",), "warm", None, lambda c: c.kind == "lora" and c.dropout == 0 and c.tokens >= 256, 2),
    ("PEFT's mixed batch", ("PEFT mixed batch",), "default", None, lambda c: True, 4),
    ("MixLoRA block, k = 2, the faster form", ("gather loop", "sorted"), "default", None, lambda c: c.kind == "block", 1.25),
]


def goals(rows):
    """Ratios with the allocator that the goal names; with the other one where a case was measured with that only."""
    measured_with = {(r["case"], r["allocator"]) for r in of_peers(rows)}
    lines = ["| against | goal | median | least | ratios | |", "|---|---|---|---|---|---|"]
    for what, peers, wanted, passes, chosen, goal in GOALS:
        ratios, allocators = {}, set()
        for r in of_peers(rows):
            allocator = wanted if (r["case"], wanted) in measured_with else r["allocator"]
            if r["peer"] in peers and r["allocator"] == allocator and passes in (None, r["pass"]) and chosen(CASE[r["case"]]):
                allocators.add(allocator)
                key = (r["case"], r["pass"], r["threads"]) + (() if "faster" in what else (r["peer"],))
                ratios[key] = min(r["ratio_median"], ratios.get(key, math.inf))
        if not ratios:
            lines.append(f"| {what} | {goal} | – | – | 0 | not measured |")
            continue
        median = statistics.median(ratios.values())
        lines.append(f"| {what} ({', '.join(sorted(allocators))}) | {goal} | {median:.2f} | {min(ratios.values()):.2f} | {len(ratios)} | "
                     f"{'met' if median >= goal else '**short**'} |")
    return lines


def losses(rows):
    """Rows in which a peer is faster than A/A spreads."""
    spread = {(r["case"], r["pass"], r["threads"], r["allocator"]): r["spread"] for r in measured(rows) if r["peer"] == "A/A"}
    for r in of_peers(rows):
        key = (r["case"], r["pass"], r["threads"], r["allocator"])
        if r["ratio_median"] < 1 - spread.get(key, 0):
            yield f"{r['case']}, {r['pass']}, {r['threads']} thread{'s' * (r['threads'] > 1)}, {r['allocator']}: " \
                  f"{r['peer']} {r['ratio_median']:.2f} (A/A ± {spread[key]:.2f})"


def table(rows, passes, allocator):
    shown = [r for r in measured(rows) if r["pass"] == passes and r["allocator"] == allocator]
    peers = [p for p in PEERS if any(r["peer"] == p for r in shown)]
    if not shown:
        return []
    lines = [f"**{passes}, {allocator} allocator**: one thread ; two threads, median [minimum]", "",
             "| case | ours, ms | A/A ± | " + " | ".join(peers) + " |", "|---" * (len(peers) + 3) + "|"]
    for case in dict.fromkeys(r["case"] for r in shown):
        of_case = {(r["peer"], r["threads"]): r for r in shown if r["case"] == case}

        def both(peer, write):
            return " ; ".join(write(of_case[peer, n]) for n in (1, 2) if (peer, n) in of_case)

        cells = [both("A/A", lambda r: f"{r['ours_ms']:.3g}"), both("A/A", lambda r: f"{r['spread']:.2f}")]
        cells += [both(p, lambda r: f"{r['ratio_median']:.2f} [{r['ratio_min']:.2f}]") for p in peers]
        lines.append(f"| {describe(case)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def describe(name):
    c = CASE[name]
    shape = f"{c.tokens} × {c.d_in} → {c.d_out}" if c.kind != "norm" else f"{c.d_out} × {c.d_in}"
    return f"{name}: {shape}, R = {c.ranks}" + (f", E = {c.experts}" if c.experts > 1 else "") + \
        (f", k = {c.chosen}" if c.chosen and c.kind in ("top_k", "block") else "")


def markdown(rows):
    lines = ["<!-- Written by bench/peers/run. A number is a peer's time over ours. -->", "", *goals(rows), ""]
    slower = list(losses(rows))
    lines += ["Where a peer is faster than an A/A run of the same case spreads:" if slower else
              "No peer is faster anywhere than an A/A run of the same case spreads.", "", *(f"- {l}" for l in slower), ""]
    for allocator in ("default", "warm"):
        for passes in ("forward", "train"):
            lines += table(rows, passes, allocator)
    missing = dict.fromkeys(f"- {r['case']}, {r['pass']}: {r['peer']}: {r['not_run']}" for r in rows if "not_run" in r)
    if missing:
        lines += ["Not run:", "", *missing, ""]
    return "\n".join(lines)


# ---- plot ------------------------------------------------------------------------------------------------------------

LEFT, WIDTH, LINE, TOP, LOW, HIGH = 330, 560, 14, 64, 0.5, 64
COLOURS = dict(zip(PEERS, ("#c0392b", "#e67e22", "#b7950b", "#8e44ad", "#8e44ad", "#16a085", "#7f8c8d", "#2c3e50", "#1f618d",
                           "#2980b9", "#27ae60", "#27ae60", "#16a085")))


def at(ratio):
    return LEFT + WIDTH * math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)


def plot(rows):
    """A line per case and pass; a mark per peer at the median ratio, thread counts and allocators alike."""
    shown = of_peers(rows)
    keys = list(dict.fromkeys((r["case"], r["pass"]) for r in shown))
    height = TOP + LINE * len(keys) + 10
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" height="{height}" font-family="sans-serif" '
             'font-size="10">', '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{LEFT}" y="14">peer time / ours (right of 1: ours is faster; 64: or more); filled: default allocator, hollow: warm</text>',
             f'<text x="{LEFT}" y="30">']
    parts += [f'<tspan fill="{COLOURS[p]}" dx="6">{escape(p)}</tspan>' for p in PEERS if any(r["peer"] == p for r in shown)]
    parts.append("</text>")
    for ratio in (0.5, 1, 2, 4, 8, 16, 32, 64):
        stroke = "#333" if ratio == 1 else "#ddd"
        parts.append(f'<line x1="{at(ratio):.1f}" y1="{TOP - 12}" x2="{at(ratio):.1f}" y2="{height - 6}" stroke="{stroke}"/>')
        parts.append(f'<text x="{at(ratio):.1f}" y="{TOP - 16}" text-anchor="middle">{ratio:g}</text>')
    for i, key in enumerate(keys):
        y = TOP + LINE * i + LINE / 2
        parts.append(f'<text x="{LEFT - 8}" y="{y + 3}" text-anchor="end">{escape(" ".join(key))}</text>')
        for r in shown:
            if (r["case"], r["pass"]) == key:
                fill = COLOURS[r["peer"]] if r["allocator"] == "default" else "none"
                parts.append(f'<circle cx="{at(r["ratio_median"]):.1f}" cy="{y}" r="3.2" fill="{fill}" stroke="{COLOURS[r["peer"]]}"/>')
    return "\n".join([*parts, "</svg>", ""])
