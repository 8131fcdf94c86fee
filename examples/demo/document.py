#!/usr/bin/env python3
"""Writes what the demo gave (build/demo/results.json) into README and docs, between <!-- demo: WHAT --> and <!-- /demo -->.

WHAT is `console` (rows as the demo prints them), `table`, `ablations`, or names of methods, separated by semicolons: their
results and what their ablations change.
"""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOMAINS = ["rotated", "inverted", "mirrored", "shifted", "noisy", "permuted"]
IN_README = ["frozen base", "full fine-tuning", "LoRA, r = 24", "AdaLoRA, 69 to 46 ranks", "TeamLoRA, 4 of 5",
             "MoRE, at most 13", "MOELoRA, 4 of 5", "MoA, 6 of 3, told"]


def plus_minus(mean, sd, sign=False):
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return f"{text.replace('-', '−')} ± {sd:.1f}"


class Results:
    def __init__(self, path):
        rows = json.loads(path.read_text())
        self.rows = [r for r in rows if "ablation of" not in r]
        self.ablations = [r for r in rows if "ablation of" in r]

    def ablations_of(self, name):
        return [r for r in self.ablations if r["ablation of"] == name]

    def console(self):
        lines = [f"{'method':28}{'trainable':>10}{'%':>7}{'seconds':>9}" + "".join(f"{d:>9}" for d in DOMAINS) +
                 f"{'average ± sd':>14}"]
        for r in self.rows:
            if r["method"] in IN_README:
                lines.append(f"{r['method']:28}{r['trainable']:10}{r['percent']:7.1f}{r['seconds']:9.1f}" +
                             "".join(f"{r['accuracy'][d]:9.1f}" for d in DOMAINS) +
                             f"{r['average']:8.1f} ± {r['sd']:3.1f}")
        return "\n".join(lines)

    def table(self):
        lines = ["| method | trainable | % | " + " | ".join(DOMAINS) + " | average ± sd |",
                 "|---|---:|---:|" + "---:|" * (len(DOMAINS) + 1)]
        group = None
        for r in self.rows:
            if r["group"] != group:
                group = r["group"]
                lines.append(f"| **{group}** |" + " |" * (len(DOMAINS) + 3))
            lines.append(f"| {r['method']} | {r['trainable']} | {r['percent']:.1f} | " +
                         " | ".join(f"{r['accuracy'][d]:.1f}" for d in DOMAINS) +
                         f" | {plus_minus(r['average'], r['sd'])} |")
        return "\n".join(lines)

    def ablation_table(self):
        lines = ["| method | ablation | average ± sd | difference ± sd |", "|---|---|---:|---:|"]
        for own in self.rows:
            of = self.ablations_of(own["method"])
            if of:
                lines.append(f"| **{own['method']}** | | {plus_minus(own['average'], own['sd'])} | |")
            for r in of:
                change = plus_minus(r["difference"]["mean"], r["difference"]["sd"], True)
                lines.append(f"| | {r['method']} | {plus_minus(r['average'], r['sd'])} | {change} |")
        return "\n".join(lines)

    def lines(self, names):
        """For an adapter's page; LoRA before it is what it is compared with, without ablations."""
        lines = []
        for name in names:
            own = next(r for r in self.rows if r["method"] == name)
            of = [] if "LoRA, r = " in name and name != names[-1] else self.ablations_of(name)
            changes = [f"{r['method']} {plus_minus(r['difference']['mean'], r['difference']['sd'], True)}" for r in of]
            lines.append(f"- {name}: {plus_minus(own['average'], own['sd'])}" +
                         (". Ablations: " + "; ".join(changes) if changes else ""))
        return "\n".join(lines)

    def block(self, what):
        made = {"console": self.console, "table": self.table, "ablations": self.ablation_table}
        if what == "console":
            return "```\n$ ./dev demo\n" + self.console() + "\n…\n```"
        return made[what]() if what in made else self.lines([name.strip() for name in what.split(";")])


def main():
    results = Results(ROOT / "build/demo/results.json")
    if not results.ablations:
        sys.exit("document.py: results.json has no ablations: ./dev demo --ablations --pictures docs/pictures")
    marked = re.compile(r"(<!-- demo: (.*?) -->\n).*?(<!-- /demo -->)", re.S)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        new = marked.sub(lambda m: m[1] + results.block(m[2]) + "\n" + m[3], text)
        if new != text:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
