"""One look for every picture: a method keeps its colour and its name, and axes say what is better.

Pictures are drawn without a display, and written as small PNGs of few colours.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from str_kernels.options import DEFAULT_KIND

DEFAULT = DEFAULT_KIND.replace("_", "-")  # the method of the default constraint
OURS, STOCK, OTHER = "#1b9e77", "#d95f02", "#7f7f7f"

# What is ours is green, what a user has without us is orange, whatever the picture compares.
COLOURS = {
    "kl-anchors-alone": "#333333",
    "kl-mass-anchors-alone": "#b03060",
    "aligned": "#7f7f7f",
    **dict.fromkeys(("ours", "str", "patched-str"), OURS),
    "kl": "#2c4fa3",  # where it is not the default
    "kl-rest": "#66a61e",
    "kl-rest-anchors": "#3b6e1a",
    "kl-mass": "#00a5cf",
    "kl-mass-30": "#00688b",
    "kl-30": "#5b3fa0",
    "kl-mass-anchors": "#9c6ade",
    "kl-share-0.5": "#4a6fd0",
    "kl-share-0.25": "#93a9e0",
    "kl-mass-share-0.5": "#4d7c0f",
    "kl-mass-share-0.25": "#a8cf60",
    "full-kl-10": "#b8860b",
    "constrained-sft": "#e41a1c",
    "safe-lora": "#b15928",
    "safeinstr": "#6a3d9a",
    **dict.fromkeys(("plain", "transformers", "materialised", "unpatched"), STOCK),
    **dict.fromkeys(("ours-str", "kl-anchors", "patched"), "#0b5d45"),
    **dict.fromkeys(("ours-filtered", "kl-weak"), "#8fd3bd"),
    **dict.fromkeys(("ours-exact", "kl-weak-anchors"), "#4db6ac"),
    **dict.fromkeys(("compiled", "kl-random-tokens"), "#fdae61"),
    **dict.fromkeys(("cce", "mse"), "#7570b3"),
    **dict.fromkeys(("liger", "logprob"), "#e7298a"),
    **dict.fromkeys(("trl", "pact"), "#a6761d"),
    **dict.fromkeys(("torch", "full-kl"), "#e6ab02"),
    **dict.fromkeys(("liger-hopper", "mse-anchors"), "#9e0142"),
    **dict.fromkeys(("liger-scaled", "mse-strong"), "#c994c7"),
    **dict.fromkeys(("quack", "mse-random-tokens"), "#3288bd"),
    "mse-labels": "#9ecae1",
}
NAMES = {
    "ours": "str_kernels (default)",
    "ours-str": "str_kernels, 64 safety tokens",
    "ours-filtered": "str_kernels, exact screen",
    "ours-exact": "str_kernels, exact",
    "transformers": "transformers, logits stored",
    "materialised": "logits stored",
    "unpatched": "transformers' own head",
    "patched": "fused head",
    "patched-str": "fused head with STR (default)",
    "compiled": "transformers, compiled",
    "torch": "F.linear_cross_entropy",
    "cce": "CCE",
    "trl": "TRL",
    "liger": "Liger",
    "plain": "plain fine-tuning",
    "kl": "kl at 10",
    "kl-rest": "kl_rest at 10",
    "kl-mass": "kl_mass at 10",
    "kl-mass-30": "kl_mass at 30",
    "kl-weak": "kl at 1",
    "mse": "mse at 0.1",
    "logprob": "logprob at 0.1",
}
_REST = ("#8c6d31", "#637939", "#843c39", "#7b4173", "#5254a3")


def colour(name: str) -> str:
    """Return a method's colour; one without a colour of its own always has the same of a few."""
    if name == DEFAULT:
        return OURS
    return COLOURS.get(name) or _REST[sum(name.encode()) % len(_REST)]


def named(name: str) -> str:
    """Return what a picture calls a method."""
    return NAMES.get(name, name) + (" (default)" if name == DEFAULT else "")


def new_figure(
    columns: int = 1, width: float = 6.0, height: float = 4.0, *, rows: int = 1
) -> tuple[Any, list[Any]]:
    """Make a figure and its axes, row by row, without top and right spines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def label(axis: Any, direction: str, text: str, better: str | None = None) -> None:
    """Name an axis, with an arrow to where values are better: ``"lower"`` or ``"higher"``."""
    arrows = {("x", "lower"): "←", ("x", "higher"): "→", ("y", "lower"): "↓", ("y", "higher"): "↑"}
    arrow = "" if better is None else f"   {arrows[direction, better]} better"
    getattr(axis, f"set_{direction}label")(text + arrow)


def whiskers(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of runs, and how far the lowest and the highest lie below and above it."""
    middle = statistics.fmean(values)
    return middle, (middle - min(values), max(values) - middle)


def legend(figure: Any, axes: Iterable[Any], columns: int = 1) -> None:
    """Put one legend for all axes beside them, each name once: it covers no data."""
    found = {}
    for axis in axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside right center", ncols=columns,
        frameon=False, fontsize=9,
    )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write a PNG of few colours, which is a third of the size and looks the same."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(192).save(path, format="PNG", optimize=True)
