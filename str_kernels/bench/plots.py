"""Draw what a comparison of heads found."""

from __future__ import annotations

from pathlib import Path

from str_kernels.bench import style
from str_kernels.bench.report import Row


def head_bars(rows: list[Row], title: str, path: Path) -> None:
    """Draw time and peak memory of every contender that ran, the quickest on top."""
    ran = [(style.whiskers([1e3 * s for s in r["seconds"]]), r) for r in rows if "gemms" in r]
    ran.sort(key=lambda timed: -timed[0][0])
    figure, axes = style.new_figure(2, width=5.5, height=1.4 + 0.32 * max(len(ran), 3))
    names = [style.named(row["contender"]) for _, row in ran]
    colours = [style.colour(row["contender"]) for _, row in ran]
    spread = [list(side) for side in zip(*(time[1] for time, _ in ran), strict=True)]
    panels = (
        ([time[0] for time, _ in ran], spread, "forward and backward, ms"),
        ([row["peak_bytes"] / 2**20 for _, row in ran], None, "peak extra memory, MiB"),
    )
    for axis, (values, error, text) in zip(axes, panels, strict=True):
        axis.barh(names, values, xerr=error, color=colours, error_kw={"lw": 0.9})
        axis.grid(visible=False, axis="y")
        axis.set_xscale("log" if max(values) > 40 * max(min(values), 1e-9) else "linear")
        for at, value in enumerate(values):
            reach = value + (error[1][at] if error else 0)
            axis.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}", (reach, at), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=9,
            )  # fmt: skip
        axis.margins(x=0.2)
        style.label(axis, "x", text, "lower")
    axes[1].set_yticks([])
    figure.suptitle(title, fontsize=11)
    style.save(figure, path)
