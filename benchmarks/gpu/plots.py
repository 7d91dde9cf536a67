"""Draw the head by N, and the stages of a call."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.axes import logarithmic, ticks_at
from benchmarks.gpu.record import STATE
from str_kernels.bench import style
from str_kernels.bench.report import Row


def draw(rows: list[Row], out: Path) -> list[Path]:
    """Draw what there is; return the files."""
    written = []
    head = [row for row in rows if row["step"] == "head" and "gemms" in row]
    for vocab, dim in dict.fromkeys((row["V"], row["D"]) for row in head):
        mine = [row for row in head if (row["V"], row["D"]) == (vocab, dim)]
        path = out / f"gpu-head-V{vocab}-D{dim}.png"
        _head(mine, f"V {vocab:,}, D {dim:,}, {mine[0]['dtype']}, frozen head", path)
        written.append(path)
    stages = [r for r in rows if r["step"] == "stages" and r["name"] != STATE and "ms" in r]
    if stages:
        path = out / "gpu-stages.png"
        _stages(stages, path)
        written.append(path)
    return written


def _head(rows: list[Row], title: str, path: Path) -> None:
    figure, axes = style.new_figure(3, width=4.2, height=4.4)
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        line = sorted((row for row in rows if row["name"] == name), key=lambda row: row["N"])
        ours = name.startswith("ours")
        look = {"marker": "osD^vPX*<>"[i % 10], "linestyle": "-" if ours else ":"}
        look |= {"label": style.named(name), "color": style.colour(name)}
        xs = [row["N"] for row in line]
        axes[0].plot(xs, [1e3 * statistics.median(row["seconds"]) for row in line], **look)
        axes[1].plot(xs, [row["gemms"] for row in line], **look)
        axes[2].plot(xs, [max(row["peak_bytes"], 1) / 2**20 for row in line], **look)
    labels = (
        "ms, forward + backward",
        "× the bare product of these rows",
        "peak extra memory, MiB",
    )
    for axis, label in zip(axes, labels, strict=True):
        logarithmic(axis, "y")
        ticks_at(axis, [row["N"] for row in rows])
        axis.set_xlabel("rows, N")
        style.label(axis, "y", label, "lower")
    axes[1].axhline(1.0, color="black", linewidth=0.8)
    style.legend(figure, axes[:1])
    figure.suptitle(f"{title}: single calls", fontsize=11)
    style.save(figure, path)


def _stages(rows: list[Row], path: Path) -> None:
    figure, (axis,) = style.new_figure(1, width=8.0, height=1.2 + 0.5 * len(rows))
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    names = [name for name in names if name not in ("whole", "forward")]
    labels, left = [row["name"] for row in rows], [0.0] * len(rows)
    for i, name in enumerate([*names, "in no stage"]):
        widths = [row["ms"].get(name, 0.0) for row in rows]
        if name == "in no stage":
            widths = [max(0.0, r["ms"]["whole"] - x) for r, x in zip(rows, left, strict=True)]
        axis.barh(labels, widths, left=left, color="#dddddd" if name == "in no stage" else f"C{i}")
        axis.plot([], [], color="#dddddd" if name == "in no stage" else f"C{i}", lw=6, label=name)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axis.set_xlabel("ms of one call")
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.save(figure, path)
