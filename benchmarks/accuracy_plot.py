"""Plot for `accuracy` what a live pair buys, beside the ordinary bf16 head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.axes import logarithmic, ticks_at
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench import plots

_ERROR = "error of the hidden states' gradient, %"

Row = dict[str, Any]


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw error by live share, for all rows and for confident ones, and error by logit scale."""
    figure, axes = plots.new_figure(3, width=4.6)
    head = next(r for r in rows if r["what"] == "bf16 head" and not r.get("largest_logit"))
    for axis, key in zip(axes, ("hidden_error", "confident_error"), strict=False):
        _by_epsilon(axis, [r for r in rows if r["what"] == "eps" and r[key]], key, head[key])
    axes[0].set_title("all rows, ε = 2⁻⁷ (left) to 2⁻¹⁵; star: the default", fontsize=10)
    axes[1].set_title("the same, confident rows alone", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    _by_scale(axes[2], [row for row in rows if row.get("largest_logit")])
    figure.suptitle(title, fontsize=11)
    plots.save(figure, path)


def _by_epsilon(axis: Any, rows: list[Row], key: str, head: float | None) -> None:
    for number, index in enumerate(dict.fromkeys(row["index"] for row in rows)):
        line, color = [r for r in rows if r["index"] == index], f"C{number}"
        points = [(100 * r["live"], 100 * r[key]) for r in line]
        axis.plot(*zip(*points, strict=True), marker="o", color=color, label=f"index: {index}")
        default = [p for r, p in zip(line, points, strict=True) if r["eps"] == DEFAULT_EPS]
        axis.plot(*zip(*default, strict=True), marker="*", markersize=14, color=color)
    if head:
        axis.axhline(100 * head, color="black", linestyle="--", label="bf16 head")
        axis.axhline(100 * head / 3, color="black", linestyle=":", label="a third of it")
    axis.set(xlabel="live pairs, %", ylabel=_ERROR)
    logarithmic(axis)


def _by_scale(axis: Any, rows: list[Row]) -> None:
    styles = {"scale": ("ours, default settings", plots.OURS, "-")}
    styles["bf16 head"] = ("bf16 head", "black", "--")
    for what, (label, color, style) in styles.items():
        line = [row for row in rows if row["what"] == what]
        xs, ys = [r["largest_logit"] for r in line], [100 * r["hidden_error"] for r in line]
        axis.plot(xs, ys, marker="o", color=color, linestyle=style, label=label)
    axis.set(xlabel="largest logit", ylabel=_ERROR)
    logarithmic(axis, "y")
    ticks_at(axis, [row["largest_logit"] for row in rows])
    axis.set_title("logit scale", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
