"""What a run of the benchmarks says against its bars: a table of classes, and a list of the other bars. Markdown.

A class passes where the median of floor/time over its shapes is at least 0.9 of what the prototypes reached (the middle,
where they reached a range); `goal` is what it aims at. The bars are written down here before a run, and nowhere else.
"""
import statistics

# class: (reached: forward on 1 and 2 threads, backward on 1 and 2; goal: forward, backward)
CLASSES = {
    "R>=128": ((0.78, 0.80, 0.73, 0.79), (0.85, 0.80)),
    "R=32..64": ((0.775, 0.74, 0.61, 0.71), (0.80, 0.70)),
    "R=16": ((0.65, 0.63, 0.55, 0.59), (0.75, 0.65)),
    "R<=8": ((1.0, 0.86, 0.71, 0.76), (0.90, 0.80)),
    "top2 r=32": ((0.63, None, 0.52, None), (0.65, 0.55)),
    "top2 r=16": ((0.56, None, 0.44, None), (0.60, 0.50)),
    "top2 r=8": ((0.44, None, 0.32, None), (0.50, 0.40)),
    "T=16": ((0.625, 0.56, 0.565, None), (0.65, 0.55)),
    "T=1 cold": ((1.065, None, None, None), (0.95, None)),
}
CAUTION = 0.9


def axes(name):
    """{family, pass, T, d_in, …} of a row's name."""
    parts = name.replace("class/", "class ").split("/")
    found = {}
    if parts[0] == "adapters" and len(parts) > 1:
        found["adapter"] = parts.pop(1)
    found |= {"family": parts[0], "pass": parts[1] if len(parts) > 1 else ""}
    for part in parts[2:]:
        key, _, value = part.partition(":")
        found[key] = int(value) if value.lstrip("-").isdigit() else value
    return found


def usable(rows, short):
    return [(axes(short(r["name"])), r) for r in rows if "floor/time" in r and not r.get("error_occurred")]


def classes(found):
    lines = ["| class | pass | threads | shapes | floor/time: median | least | bar | goal | |", "|---" * 9 + "|"]
    for name, (reached, goals) in CLASSES.items():
        for p, passes in enumerate(("forward", "backward")):
            for threads in (1, 2):
                values = [r["floor/time"] for a, r in found if a["family"] in ("class " + name, f"class {name} mixture")
                          and a["pass"] == passes and a["threads"] == threads]
                if not values:
                    continue
                median, bar = statistics.median(values), reached[2 * p + threads - 1]
                said = "–" if bar is None else f"{CAUTION * bar:.2f}"
                verdict = "" if bar is None else "met" if median >= CAUTION * bar else "**short**"
                goal = f"{goals[p]:.2f}" if threads == 1 or bar is not None else "–"
                lines.append(f"| {name} | {passes} | {threads} | {len(values)} | {median:.2f} | {min(values):.2f} | {said} | {goal} | {verdict} |")
    return lines


def selects(row):
    """Whether the row's gate closes ranks: only then does a masked form stand beside it."""
    return "masked/ours" in row


def ratios(found, baseline, chosen):
    return [(a, r[baseline + "/ours"], r) for a, r in found if baseline + "/ours" in r and chosen(a)]


def at_least(what, values, median_bar, least_bar=None):
    """One line: a median against its bar, and the least where that has one."""
    if not values:
        return f"| {what} | ≥ {median_bar:.2f} | – | – | 0 | not measured |"
    median, least = statistics.median(values), min(values)
    met = median >= median_bar and (least_bar is None or least >= least_bar)
    bar = f"≥ {median_bar:.2f}" + ("" if least_bar is None else f", least ≥ {least_bar:.2f}")
    return f"| {what} | {bar} | {median:.2f} | {least:.2f} | {len(values)} | {'met' if met else '**short**'} |"


def at_most(what, values, bar):
    if not values:
        return f"| {what} | ≤ {bar} | – | – | 0 | not measured |"
    median = statistics.median(values)
    return f"| {what} | ≤ {bar} | {median:.2f} | {max(values):.2f} | {len(values)} | {'met' if median <= bar else '**short**'} |"


def others(found):
    lines = ["| bar | | median | worst | rows | |", "|---" * 6 + "|"]
    # Beside side rows Eigen's product has none (product.cpp): that is less work, and no peer.
    eigen = ratios(found, "eigen", lambda a: a.get("scalar") == "float" and a["family"] != "adapters"
                   and not a["family"].startswith("side rows"))
    lines.append(at_least("careful Eigen's time over ours, every rank open", [v for _, v, r in eigen if not selects(r)], 1.15, 1.0))
    # Eigen multiplies all ranks: where a gate closes some, loops over experts and gathers by token are what it has to beat.
    fastest = [min(r[b + "/ours"] for b in ("eigen", "loop", "gather") if b + "/ours" in r) for _, _, r in eigen if selects(r)]
    lines.append(at_least("the fastest of Eigen, a loop and a gather over ours, where a gate selects", fastest, 1.15, 1.0))
    mixtures = [1 / v for _, v, _ in ratios(found, "lora", lambda a: a["family"] in ("class R>=128 mixture", "B2", "B4"))]
    lines.append(at_most("a dense mixture over LoRA of its total rank", mixtures, 1.05))
    mixtures = [1 / v for _, v, _ in ratios(found, "lora", lambda a: a["family"].startswith("side rows"))]
    lines.append(at_most("with a router's rows over LoRA with the same rows", mixtures, 1.05))
    for name, chosen, bar in (("r ≥ 16", ("class top2 r=16", "class top2 r=32"), 2.0), ("r = 8", ("class top2 r=8",), 1.6)):
        masked = [v for _, v, _ in ratios(found, "masked", lambda a: a["family"] in chosen)]
        lines.append(at_least(f"top-2 of 8, {name}: the masked dense form over ours", masked, bar))
    prefixes = []
    for _, lora, r in ratios(found, "lora", lambda a: a["family"] == "MoRE prefix"):
        prefixes.append((1 / lora) / max(r["open"], r["twin/ours"] / lora))
    lines.append(at_most("MoRE prefix over LoRA, by the larger of open ranks and moved bytes", prefixes, 1.15))
    for passes, bar in (("forward", 1.40), ("train", 1.15)):
        cost = [1 / v for _, v, _ in ratios(found, "no dropout", lambda a: a["pass"] == passes)]
        lines.append(at_most(f"dropout, R = 16, {passes}: over none", cost, bar))
    for passes, bar in (("forward", 4.0), ("backward", 3.0)):
        amx = [v for _, v, _ in ratios(found, "float", lambda a: a.get("scalar") == "bfloat16-amx" and a["pass"] == passes)]
        lines.append(at_least(f"bfloat16 by AMX, {passes}: float's time over ours", amx, bar))
    return lines


def adapters(found):
    """Every adapter at one shape, beside LoRA of as many ranks (DoRA and the MixLoRA block: and as many base products)."""
    rows = {}
    for a, r in found:
        if "adapter" in a:
            rows.setdefault(a["adapter"], {})[a["pass"]] = r
    lines = ["| adapter | forward, ms | LoRA's over it | floor/time | training, ms | LoRA's over it | floor/time |", "|---" * 7 + "|"]
    for name, passes in rows.items():
        cells = []
        for p in ("forward", "train"):
            r = passes.get(p)
            cells += ["–"] * 3 if r is None else [f"{r['real_time']:.3g}", f"{r['lora/ours']:.2f}", f"{r['floor/time']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines if rows else []


def summary(rows, short):
    found = usable(rows, short)
    if not found:
        return ""
    return "\n".join([*classes(found), "", *others(found)]) + "\n"


def summary_of_adapters(rows, short):
    return "\n".join(adapters(usable(rows, short))) + "\n"
