"""Writes "Against published measurements" in cost.md, and its figure:
`costbp cost --published --json > FILE; python docs/published.py FILE`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).with_name("cost.md")
FIGURE = Path(__file__).with_name("published.svg")
MARKED = re.compile(r"(<!-- published -->\n).*?(<!-- end -->)", re.S)
GB = 1e9
MARKERS = "osD^vP*X"


def table(found: dict[str, Any]) -> str:
    """Errors by source, of differences, and what is not expressed."""
    lines = ["| source | rows | median error | 80th of 100 | bias | closed form's median |"]
    lines.append("|" + "---|" * 6)
    for score in found["scores"]:
        parts = (100 * score[key] for key in ("median", "eighty", "bias", "rival"))
        median, eighty, bias, rival = parts
        lines.append(
            f"| {score['name']} | {score['count']} | {median:.1f} % | {eighty:.1f} % "
            f"| {bias:+.1f} % | {rival:.1f} % |"
        )
    lines += ["", "| differences: what differs | pairs | median error | 80th of 100 | bias |"]
    lines.append("|" + "---|" * 5)
    for score in found["difference_scores"]:
        median, eighty, bias = (100 * score[key] for key in ("median", "eighty", "bias"))
        name = f"`{score['name']}`" if "." in score["name"] else score["name"]
        lines.append(
            f"| {name} | {score['count']} | {median:.0f} % | {eighty:.0f} % | {bias:+.0f} % |"
        )
    left: dict[tuple[str, str], int] = {}
    for row in found["rows"]:
        if row["predicted"] is None:
            key = row["source"], row["why"]
            left[key] = left.get(key, 0) + 1
    total, expressed = len(found["rows"]), len(found["rows"]) - sum(left.values())
    lines += ["", f"{expressed} of {total} rows of memory are expressed. The others:", ""]
    lines += ["| source | rows | why not |", "|---|---|---|"]
    lines += [f"| {source} | {count} | {why} |" for (source, why), count in left.items()]
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Any]) -> None:
    """Predicted against published: rows on the left, differences of two rows on the right."""
    plt.rcParams |= {"svg.hashsalt": "costbp", "font.size": 9}
    drawn, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    rows = [row for row in found["rows"] if row["predicted"] is not None and row["absolute"]]
    _points(axes[0], rows, "rows: all bytes of a step, GB", "source")
    apart = [d for d in found["differences"] if d["published"] * d["predicted"] > 0]
    _points(axes[1], apart, "differences of two rows, GB", "source")
    drawn.savefig(FIGURE, metadata={"Date": None})


def _points(axis: Any, points: list[dict[str, Any]], title: str, by: str) -> None:
    names = list(dict.fromkeys(point[by] for point in points))
    for name, marker in zip(names, MARKERS, strict=False):
        own = [p for p in points if p[by] == name]
        x, y = ([abs(p[key]) / GB for p in own] for key in ("published", "predicted"))
        axis.scatter(x, y, s=26, marker=marker, label=name, alpha=0.8)
    ends = [abs(p[key]) / GB for p in points for key in ("published", "predicted")]
    low, high = 0.8 * min(ends), 1.25 * max(ends)
    axis.plot([low, high], [low, high], color="0.4", linewidth=1)
    for share in (0.9, 1.1):
        axis.plot([low, high], [share * low, share * high], color="0.7", linewidth=0.8, ls="--")
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=title)
    axis.set(xlabel="published", ylabel="predicted", aspect="equal")
    steps = [s * 10.0**e for e in range(-2, 4) for s in (1, 2, 5)]
    ticks = [tick for tick in steps if low <= tick <= high]
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        side.set_ticks([], minor=True)
    axis.legend(fontsize=8)


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"), parse_constant=float)
    text, block = PAGE.read_text(encoding="utf-8"), table(found)
    PAGE.write_text(MARKED.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")
    figure(found)


if __name__ == "__main__":
    main()
