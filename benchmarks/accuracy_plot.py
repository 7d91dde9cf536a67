"""Plot for `accuracy` what a live pair buys, beside the ordinary bf16 head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.axes import logarithmic, ticks_at
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench import style

_ERROR = "gradient error, %"
_TITLES = {
    "hidden_error": "all rows, ε = 2⁻⁷ (right) to 2⁻¹⁵; star: the default",
    "confident_error": "the same, confident rows alone",
}
_COLOURS = (style.OURS, "#7570b3", "#a6761d", "#3288bd")

Row = dict[str, Any]


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw error by live share, for all rows and for confident ones, and error by logit scale."""
    head = next(r for r in rows if r["what"] == "bf16 head" and not r.get("largest_logit"))
    by_epsilon = {key: [r for r in rows if r["what"] == "eps" and r[key]] for key in _TITLES}
    drawn = {key: found for key, found in by_epsilon.items() if found}  # few rows: none confident
    figure, axes = style.new_figure(len(drawn) + 1, width=4.4)
    for axis, (key, found) in zip(axes, drawn.items(), strict=False):
        _by_epsilon(axis, found, key, head[key])
        axis.set_title(_TITLES[key], fontsize=10)
    _by_scale(axes[-1], [row for row in rows if row.get("largest_logit")])
    figure.suptitle(title, fontsize=11)
    style.legend(figure, axes)
    style.save(figure, path)


def _by_epsilon(axis: Any, rows: list[Row], key: str, head: float | None) -> None:
    for number, index in enumerate(dict.fromkeys(row["index"] for row in rows)):
        line = [r for r in rows if r["index"] == index]
        color = _COLOURS[number % len(_COLOURS)]
        points = [(100 * r["live"], 100 * r[key]) for r in line]
        axis.plot(*zip(*points, strict=True), marker="o", color=color, label=f"index: {index}")
        default = [p for r, p in zip(line, points, strict=True) if r["eps"] == DEFAULT_EPS]
        star = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": "none"}
        axis.plot(*zip(*default, strict=True), color=color, **star)
    if head:
        axis.axhline(100 * head, color="black", linestyle="--", label="bf16 head")
        axis.axhline(100 * head / 3, color="black", linestyle=":", label="a third of it")
    style.label(axis, "x", "pairs computed exactly (time), %", "lower")
    style.label(axis, "y", _ERROR, "lower")
    logarithmic(axis)


def _by_scale(axis: Any, rows: list[Row]) -> None:
    looks = {"scale": ("str_kernels (default)", style.OURS, "-")}
    looks["bf16 head"] = ("bf16 head", "black", "--")
    for what, (label, color, line_style) in looks.items():
        line = [row for row in rows if row["what"] == what]
        xs, ys = [r["largest_logit"] for r in line], [100 * r["hidden_error"] for r in line]
        axis.plot(xs, ys, marker="o", color=color, linestyle=line_style, label=label)
    axis.set_xlabel("largest logit")
    style.label(axis, "y", _ERROR, "lower")
    logarithmic(axis, "y")
    ticks_at(axis, [row["largest_logit"] for row in rows])
    axis.set_title("larger logits", fontsize=10)
