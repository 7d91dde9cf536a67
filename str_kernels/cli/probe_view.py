"""The probe of a fine-tuning run in the terminal, and its picture at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from str_kernels.cli.console import say

if TYPE_CHECKING:
    from str_kernels.training.settings import TrainSettings

PICTURE = "safety_probe.png"
PROBED = ("safety_probe/refusal", "safety_probe/mass", "safety_probe/divergence")

_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = 24  # probes beside the bar


def course(refusals: Sequence[float]) -> str:
    """Return the newest probes as blocks from 0 to 1, and the last of them as a number."""
    top = len(_BLOCKS) - 1
    blocks = "".join("?" if math.isnan(x) else _BLOCKS[round(top * x)] for x in refusals[-_SHOWN:])
    return f"refusing {blocks} {refusals[-1]:.2f}"


def probe_rows(probe: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the result's table."""
    first, last = probe["refusal"][0], probe["refusal"][-1]
    rows = [["probe: refusing left", f"{last:.3f} (began at {first:.3f})"]]
    if probe["mass"]:
        first, last = probe["mass"][0], probe["mass"][-1]
        rows.append(["probe: mass of the tokens", f"{last:.3f} (began at {first:.3f})"])
        rows.append(["probe: divergence among them", f"{probe['divergence'][-1]:.4f} nats"])
    took = f"{probe['seconds']:.1f} s, {100 * probe['time_share']:.1f} % of the run"
    return [*rows, ["probe: time", took]]


def draw_probe(probe: dict[str, Any], settings: TrainSettings) -> Path:
    """Draw refusing and the tokens' mass by step, and below them the divergence."""
    from str_kernels.bench import style

    figure, axes = style.new_figure(width=7.0, height=2.8, rows=2 if probe["mass"] else 1)
    steps = probe["steps"]
    axes[0].plot(steps, probe["refusal"], marker="o", color=style.OURS, label="refusing left")
    axes[0].set_ylim(-0.04, 1.04)
    axes[0].set_title("how much of the aligned model's refusing is left", fontsize=11)
    if settings.probe_stop is not None:
        axes[0].axhline(settings.probe_stop, color=style.STOCK, ls="--", label="stops below")
    if probe["kept_step"] is not None and probe["stopped_at"] is not None:
        axes[0].axvline(probe["kept_step"], color=style.OTHER, ls=":", label="kept")
    style.label(axes[0], "y", "share, 0 to 1", "higher")
    if probe["mass"]:
        axes[0].plot(
            steps, probe["mass"], marker="s", color=style.OTHER, label="mass of the safety tokens"
        )
        axes[1].plot(
            steps, probe["divergence"], marker="o", color=style.STOCK, label="divergence among them"
        )
        style.label(axes[1], "y", "nats", "lower")
    axes[-1].set_xlabel("step")
    style.legend(figure, axes)
    path = settings.folder / PICTURE
    style.save(figure, path)
    say(f"saved {path}")
    return path
