#!/usr/bin/env python3
"""A picture per adapter, docs/pictures/<page>.svg: what x goes through, what is shared, frozen and trained, where the router reads.

Drawn from the descriptions below. Without '--fix': the files are as drawn, and every page of docs/adapters shows its own.
"""

import html
import re
import sys

from sources import ROOT, finish, shown

PAGES = ROOT / "docs" / "adapters"
PICTURES = ROOT / "docs" / "pictures"
WIDTH, LANE = 760, 42
FROZEN, TRAINED, SHARED, PLAIN = ("#e9e9e9", "#8c8c8c"), ("#d6e8f7", "#0072b2"), ("#fbe3cd", "#d55e00"), ("#ffffff", "#333333")
X, BRANCH, A, GATE, MIX, B, SUM, ADD = 36, 76, 118, 300, 232, 372, 540, 640  # where things stand, from left to right


class Picture:
    def __init__(self):
        self.body = []

    def text(self, x, y, words, anchor="middle", size=12, colour="#333333"):
        """`a_b` and `a_{bc}` are subscripts."""
        parts = re.split(r"_(\{[^}]*\}|\S)", words)
        spans = html.escape(parts[0])
        for low, after in zip(parts[1::2], parts[2::2]):
            spans += f'<tspan dy="3" font-size="{size - 3}">{html.escape(low.strip("{}"))}</tspan>'
            space = ' dx="4"' if after.startswith(" ") else ""  # renderers swallow it between spans
            spans += f'<tspan dy="-3"{space}>{html.escape(after.strip())}</tspan>' if after else ""
        self.body.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{spans}</text>')

    def box(self, x, y, width, height, words, kind, dashed=False):
        fill, stroke = kind
        dash = ' stroke-dasharray="4 3" fill-opacity="0.4"' if dashed else ""
        self.body.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{stroke}"{dash}/>')
        self.text(x + width / 2, y + height / 2 + 4, words, colour="#999999" if dashed else "#333333")

    def node(self, x, y, words, radius=13):
        self.body.append(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="#ffffff" stroke="#333333"/>')
        self.text(x, y + 4, words)

    def line(self, points, arrow=True, dashed=False):
        path = " ".join(f"{x},{y}" for x, y in points)
        style = ' stroke-dasharray="4 3" stroke="#b0b0b0"' if dashed else ' stroke="#333333"'
        style += ' marker-end="url(#to)"' if arrow else ""
        self.body.append(f'<polyline points="{path}" fill="none"{style}/>')

    def svg(self, title, height, legend):
        x = X - 12
        for words, kind in legend:
            self.box(x, height - 24, 12, 12, "", kind, words == "closed here")
            self.text(x + 18, height - 14, words, "start", 11)
            x += 34 + 6 * len(words)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
                f'font-family="Helvetica, Arial, sans-serif">\n<title>{html.escape(title)}</title>\n'
                '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
                '<path d="M0,0 L8,4 L0,8 z" fill="#333333"/></marker></defs>\n'
                f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(self.body) + "\n</svg>\n")



class Product(Picture):
    """The gated product: a lane per expert, A or its segments, a gate, B; a router below."""

    def __init__(self, lanes):
        super().__init__()
        self.count = len(lanes)
        self.lanes = lanes
        self.rows = [107 + LANE * i for i in range(self.count)]
        self.centre = (self.rows[0] + self.rows[-1]) / 2
        self.foot = self.rows[-1] + LANE + 19  # of the router

    def base(self, after, scaled, dropped):
        """x, W and y, and the way down to the lanes and up again."""
        self.node(X, 40, "x")
        self.line([(X + 13, 40), (SUM - 300, 40)])
        self.box(SUM - 300, 25, 90, 30, "W", FROZEN)
        self.line([(SUM - 210, 40), (ADD - 13, 40)])
        self.node(ADD, 40, "+")
        if after:
            self.line([(ADD + 13, 40), (ADD + 26, 40)])
            self.box(ADD + 26, 25, 44, 30, after, TRAINED)
        self.line([(ADD + (70 if after else 13), 40), (WIDTH - 26, 40)])
        self.node(WIDTH - 14, 40, "y", 12)
        if dropped:
            self.text(BRANCH + 6, 76, "dropout", "start", 10, "#777777")
        if self.count > 1:
            self.node(SUM, self.rows[0], "Σ")
        self.line([(SUM + (13 if self.count > 1 else 0), self.rows[0]), (ADD, self.rows[0]), (ADD, 53)])
        if scaled:
            self.text(ADD - 8, self.rows[0] - 6, "· s", "end", 11)

    def shrinks(self, a, to, shared, tall, mixer, closed):
        """x to every lane's A, and on to `to`."""
        kind = SHARED if shared or tall else TRAINED
        self.line([(BRANCH, 40), (BRANCH, self.centre if shared else self.rows[-1])], False)
        if shared:
            self.line([(BRANCH, self.centre), (A, self.centre)])
            self.box(A, self.centre - 15, 80, 30, a, kind)
        if tall:
            self.box(A - 5, self.rows[0] - 20, 90, LANE * self.count - 2, "", kind)
            self.text(A + 40, self.rows[-1] + 35, f"one {a}, in segments", size=10, colour="#777777")
        for i, (lane, y) in enumerate(zip(self.lanes, self.rows)):
            if shared:
                self.line([(A + 80, self.centre), (A + 104, self.centre), (A + 104, y), (to, y)])
                continue
            self.line([(BRANCH, y), (A, y)], dashed=i in closed)
            self.box(A, y - 15, 80, 30, a + lane, kind, i in closed)
            if mixer:
                self.line([(A + 80, y), (MIX, y)])
                self.box(MIX, y - 15, 60, 30, mixer, TRAINED)
            self.line([(MIX + 60 if mixer else A + 80, y), (to, y)], dashed=i in closed)

    def expands(self, b, behind, closed):
        """Every lane's B, and on to the sum."""
        for i, (lane, y) in enumerate(zip(self.lanes, self.rows)):
            self.box(B, y - 15, 80, 30, b + lane, TRAINED, i in closed)
            start = B + 80
            if behind:
                self.line([(start, y), (start + 22, y)])
                self.box(start + 22, y - 15, 40, 30, behind + lane, TRAINED)
                start += 62
            self.line([(start, y), (SUM - (13 if self.count > 1 else 0), y)], self.count > 1 and i == 0, i in closed)
            if i > 0:
                last = i == self.count - 1 and i not in closed
                self.line([(SUM - 13, y), (SUM, y), (SUM, self.rows[0] + 13)], last, i in closed)

    def gates(self, words, closed):
        for i, y in enumerate(self.rows):
            self.line([(GATE, y), (B, y)], dashed=i in closed)
            if i + 1 < self.count:
                self.line([(GATE, self.rows[i + 1] - 13), (GATE, y + 13)], False)
            self.node(GATE, y, "×")
            self.text(GATE + 17, y - 6, words[i], "start", 11)

    def router(self, chain, source):
        """What makes the gate, from left to right: fed by x, by `source`, or, where that is empty, by nothing."""
        x, y = X + 24, self.foot
        if source is None:
            self.line([(X, 53), (X, y), (x, y)], False)
        elif source:
            self.box(X - 12, y - 15, 60, 30, source, PLAIN)
            x = X + 48
        for words, kind in chain:
            width = 26 + 6.4 * len(re.sub(r"[_{}]", "", words))
            if x != X + 24 or source is None:
                self.line([(x, y), (x + 16, y)])
            self.box(x + 16, y - 15, width, 30, words, kind)
            x += 16 + width
        end = [(GATE, self.rows[-1] + 13)]
        if x < GATE - 4:
            self.line([(x, y), (GATE, y)] + end)
        else:  # the chain is longer than the way: it comes back above
            self.line([(x, y), (x + 12, y), (x + 12, y - 24), (GATE, y - 24)] + end)


def product(title, lanes=("",), gates=None, closed=(), router=(), source=None, mixer=None, behind=None, after=None, shared_a=False,
            tall=False, scaled=True, dropped=True, note=""):
    """gates: words of the nodes. mixer: a box between A and B; behind: one between B and the sum; after: one behind the sum with
    the base. shared_a: one A; tall: one A whose segments the lanes are. scaled, dropped: by s, before A.
    """
    p = Product(lanes)
    p.base(after, scaled, dropped)
    p.shrinks("A", GATE - 13 if gates else B, shared_a, tall, mixer, closed)
    p.expands("B", behind, closed)
    if gates:
        p.gates(gates, closed)
        p.router(router, source)
    height = p.foot + 62 if gates else p.rows[-1] + 57
    if note:
        height += 0 if gates else 10
        p.text(X - 12, height - 30, note, "start", 11, "#555555")
        height += 18
    kinds = [("frozen", FROZEN), ("trained", TRAINED)]
    kinds += [("trained, shared", SHARED)] if shared_a or tall else []
    kinds += [("closed here", TRAINED)] if closed else []
    return p.svg(title, height, kinds)


def ia3():
    p = Picture()
    p.node(X, 40, "x")
    p.line([(X + 13, 40), (200, 40)])
    p.box(200, 25, 90, 30, "W", FROZEN)
    p.line([(290, 40), (387, 40)])
    p.node(400, 40, "×")
    p.line([(413, 40), (WIDTH - 26, 40)])
    p.node(WIDTH - 14, 40, "y", 12)
    p.box(360, 92, 80, 30, "l [d_{out}]", TRAINED)
    p.line([(400, 92), (400, 53)])
    p.text(X - 12, 152, "or, before a feed-forward product:", "start", 11, "#555555")
    p.node(X, 190, "x")
    p.line([(X + 13, 190), (147, 190)])
    p.node(160, 190, "×")
    p.line([(173, 190), (300, 190)])
    p.box(300, 175, 90, 30, "W", FROZEN)
    p.line([(390, 190), (WIDTH - 26, 190)])
    p.node(WIDTH - 14, 190, "y", 12)
    p.box(120, 236, 80, 30, "l [d_{in}]", TRAINED)
    p.line([(160, 236), (160, 203)])
    return p.svg("IA3", 304, [("frozen", FROZEN), ("trained", TRAINED)])


def prompt():
    p = Picture()
    for i, words in enumerate(("sequence 1", "sequence 2")):
        y = 24 + 76 * i
        p.text(X - 12, y + 20, words, "start")
        p.box(120, y, 140, 30, "prompt [v, d]", SHARED)
        p.box(260, y, 190 - 60 * i, 30, f"rows of x_{i + 1}", PLAIN)
        p.line([(450 - 60 * i, y + 15), (560, y + 15)])
    p.box(560, 14, 90, 126, "the model", FROZEN)
    p.line([(650, 77), (WIDTH - 20, 77)])
    return p.svg("Prompt tuning", 184, [("frozen", FROZEN), ("trained, shared", SHARED)])


def mix_lora():
    p = Picture()
    p.node(X, 150, "x")
    for y, w, name, lora in ((40, "W_1", "u", "1"), (96, "W_3", "v", "3")):
        p.line([(X + 13, 150), (BRANCH, 150), (BRANCH, y), (110, y)])
        p.box(110, y - 15, 60, 30, w, FROZEN)
        p.line([(170, y), (330, y)])
        p.text(240, y - 6, f"{name} = {w} x, once", size=11)
    for i, lane in enumerate(("_{1}", "_{2}", "_{E}")):
        y, off = 158 + LANE * i, i == 1
        p.line([(BRANCH, 150), (BRANCH, y), (110, y)], dashed=off)
        p.box(110, y - 15, 200, 30, f"B1{lane} A1{lane} x̂, B3{lane} A3{lane} x̂", TRAINED, off)
        p.line([(310, y), (330, y)], dashed=off)
        p.line([(420, y), (467, y)], dashed=off)
        p.text(340, y + 4, f"h{lane}", "start", colour="#999999" if off else "#333333")
        if not off:
            p.line([(480, y + (13 if i else -13)), (480, y)], False)
        p.node(480, y, "×")
        p.text(497, y - 4, f"g{lane}", "start", 11)
    p.box(330, 20, 90, 256, "", PLAIN)
    p.text(375, 88, "silu(u + …)")
    p.text(375, 106, "∘ (v + …)")
    for i, lane in enumerate(("_{1}", "_{2}", "_{E}")):
        p.text(375, 162 + LANE * i, f"h{lane}", colour="#999999" if i == 1 else "#333333")
    p.line([(493, 158), (540, 158), (540, 68), (560, 68)])
    p.line([(493, 242), (540, 242), (540, 158)], False)
    p.text(534, 60, "Σ g h", "end", 11)
    p.box(560, 53, 60, 30, "W_2", FROZEN)
    p.line([(620, 68), (677, 68)])
    p.line([(540, 200), (560, 200)])
    p.box(560, 185, 90, 30, "B2_e A2_e", TRAINED)
    p.line([(650, 200), (690, 200), (690, 81)])
    p.text(684, 178, "· s", "end", 11)
    p.node(690, 68, "+")
    p.line([(703, 68), (WIDTH - 26, 68)])
    p.node(WIDTH - 14, 68, "y", 12)
    p.line([(X, 163), (X, 306), (110, 306)])
    p.box(110, 291, 60, 30, "W_g", TRAINED)
    p.line([(170, 306), (200, 306)])
    p.box(200, 291, 200, 30, "softmax, top-k, renormalised", PLAIN)
    p.line([(400, 306), (480, 306), (480, 255)])
    return p.svg("MixLoRA", 362, [("frozen", FROZEN), ("trained", TRAINED), ("closed here", TRAINED)])


EXPERTS = ("_{1}", "_{2}", "_{E}")
WEIGHTS = ("g_1", "g_2", "g_E")
DRAWN = {
    "lora": lambda: product("LoRA"),
    "dora": lambda: product("DoRA", after="m / n", note="n: row lengths of W + s B A, constant in the gradient; m starts as those of W"),
    "moslora": lambda: product("MoSLoRA", mixer="S"),
    "multi_lora": lambda: product("MultiLoRA", ("_{1}", "_{2}", "_{n}"), behind="γ", note="γ: a factor per output, 0 at the start"),
    "ada_lora": lambda: product("AdaLoRA", gates=("λ",), router=[("λ [r]", TRAINED)], source="",
                                note="a budget over all layers sets the λ of the least important ranks to 0; they may return"),
    "lora_moe": lambda: product("LoRAMoE", EXPERTS, gates=WEIGHTS, router=[("W_g", TRAINED), ("softmax", PLAIN)]),
    "hydra_lora": lambda: product("HydraLoRA", EXPERTS, shared_a=True, gates=WEIGHTS, router=[("W_g", TRAINED), ("softmax", PLAIN)]),
    "team_lora": lambda: product("TeamLoRA", EXPERTS, tall=True, gates=("ω_1", "ω_2", "ω_E"),
                                 router=[("S", TRAINED), ("softmax = φ", PLAIN), ("M", TRAINED)],
                                 note="S reads the token, as here, its sequence, or an embedding of its task"),
    "mola": lambda: product("MoLA", EXPERTS, gates=("g_1", "", "g_E"), closed={1}, router=[("W_g", TRAINED), ("top-k, softmax", PLAIN)]),
    "moe_lora": lambda: product("MOELoRA", EXPERTS, gates=WEIGHTS, source="task τ",
                                router=[("e_τ", TRAINED), ("W_g", TRAINED), ("softmax", PLAIN)],
                                note="the same gate for all tokens of a task"),
    "more": lambda: product("MoRE", (" rank 1", " rank 2", " rank 3"), gates=("1", "1", ""), closed={2}, source="task τ",
                            router=[("e_τ", TRAINED), ("W_g, b_g", TRAINED), ("argmax = r_τ", PLAIN)],
                            note="a prefix of r_τ ranks is open, here 2; times the law; the argmax passes its gradient straight through"),
    "moa": lambda: product("MoA", EXPERTS, gates=("", "1", ""), closed={0, 2},
                           router=[("mean of the sequence", PLAIN), ("W_g, b_g", TRAINED), ("argmax", PLAIN)],
                           note="one expert per sequence: that of its label where there is one, else the router's"),
    "serving": lambda: product("Serving", ("_{0}", "_{1}", "_{2}"), gates=("", "s_1", ""), scaled=False, dropped=False, closed={0, 2}, source="request",
                               router=[("its adapter's id", PLAIN)],
                               note="LoRAs of mixed ranks and scales, trained elsewhere; id −1: no lane at all"),
    "ia3": ia3,
    "prompt": prompt,
    "mix_lora": mix_lora,
}


def main():
    fix, problems = "--fix" in sys.argv[1:], []
    for name, draw in DRAWN.items():
        path, page, svg = PICTURES / f"{name}.svg", PAGES / f"{name}.md", draw()
        if not path.is_file() or path.read_text() != svg:
            if fix:
                path.parent.mkdir(exist_ok=True)
                path.write_text(svg)
                print(f"drew {shown(path)}")
            else:
                problems.append(f"{shown(path)}: not as drawn (tests/checks/pictures.py --fix)")
        if not page.is_file() or f"](../pictures/{name}.svg)" not in page.read_text():
            problems.append(f"{shown(page)}: does not show {shown(path)}")
    for page in sorted(PAGES.glob("*.md")):
        if page.stem != "README" and page.stem not in DRAWN:
            problems.append(f"{shown(page)}: no picture is drawn for it")
    return finish(problems, f"{len(DRAWN)} pictures, each as drawn and on its page")


if __name__ == "__main__":
    sys.exit(main())
