"""Draw the plots without a display; every axis says what it counts."""

from __future__ import annotations

from pathlib import Path

from str_kernels.bench.report import Row

OURS, THEIRS = "#1f6f8b", "#b8b8b8"


def new_figure(columns: int = 1, width: float = 6.0, height: float = 4.0):
    """Make a figure and its axes, side by side, without top and right spines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def head_bars(rows: list[Row], title: str, path: Path) -> None:
    """Draw time and peak memory of every contender that ran, the quickest on top."""
    ran = sorted((row for row in rows if "gemms" in row), key=lambda row: -row["gemms"])
    figure, axes = new_figure(2, width=5.5, height=1.2 + 0.32 * max(len(ran), 3))
    names = [row["contender"] for row in ran]
    colors = [OURS if name.startswith("ours") else THEIRS for name in names]
    panels = (
        ([row["gemms"] for row in ran], "time, forward + backward (1 = the bare GEMM)", "{:.2f}"),
        ([row["peak_bytes"] / 2**20 for row in ran], "peak extra memory, MiB", "{:.0f}"),
    )
    for axis, (values, label, form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt=form, padding=3, fontsize=9)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    axes[1].set_yticks([])
    figure.suptitle(title, fontsize=11)
    save(figure, path)
