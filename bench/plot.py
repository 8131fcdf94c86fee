"""floor/time of every row as an SVG of horizontal bars, with what the baselines reach as ticks. Standard library only."""
from xml.sax.saxutils import escape

LEFT, WIDTH, BAR, GAP, TOP = 520, 480, 12, 6, 46
COLOURS = {"eigen": "#c0392b", "loop": "#8e44ad"}  # of the same product: what computes another has another floor


def draw(rows, short):
    shown = [r for r in rows if "floor/time" in r and not r.get("error_occurred")]
    height = TOP + len(shown) * (BAR + GAP) + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{height}" '
             'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{LEFT}" y="14">floor/time (bar); ticks: the same for']
    parts += [f'<tspan fill="{colour}" dx="6">{name}</tspan>' for name, colour in COLOURS.items()]
    parts.append("</text>")

    def at(value):
        return LEFT + WIDTH * min(max(value, 0), 1.2) / 1.2

    for tenth in range(0, 13, 2):
        x = at(tenth / 10)
        stroke = "#333" if tenth == 10 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 12}" x2="{x:.1f}" y2="{height - 16}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 16}" text-anchor="middle">{tenth / 10:.1f}</text>')
    for i, row in enumerate(shown):
        y, value = TOP + i * (BAR + GAP), row["floor/time"]
        parts.append(f'<text x="{LEFT - 8}" y="{y + BAR - 2}" text-anchor="end">{escape(short(row["name"]))}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{at(value) - LEFT:.1f}" height="{BAR}" fill="#3b7dd8"/>')
        for name, colour in COLOURS.items():
            ratio = row.get(name + "/ours")
            if ratio:
                x = at(value / ratio)
                parts.append(f'<line x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + BAR + 2}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{at(value) + 5:.1f}" y="{y + BAR - 2}">{value:.2f}</text>')
    return "\n".join([*parts, "</svg>", ""])
