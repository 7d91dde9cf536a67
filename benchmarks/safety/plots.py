"""Draw the report's pictures: refusals against the task, and the course of training."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.safety.findings import Findings, Group
from str_kernels.bench.plots import new_figure

COLOURS = ("#444444", "#1f6f8b", "#c8553d", "#588157", "#8d6a9f", "#d4a017")


def pareto(findings: Findings, setting: str, path: Path) -> None:
    """Draw refusals against the task's accuracy, a point a method with 95 % intervals."""
    figure, (axis,) = new_figure()
    for index, group in enumerate(findings.of(setting)):
        refused, right = group.rate("harmful", "refusal"), group.rate("task")
        if refused is None or right is None:
            continue
        x, y = 100 * right.value, 100 * refused.value
        spread = [[_half(right, 0)], [_half(right, 1)]], [[_half(refused, 0)], [_half(refused, 1)]]
        colour = COLOURS[index % len(COLOURS)]
        axis.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o", color=colour, lw=0.8)
        axis.annotate(group.method, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.set_xlabel("task accuracy, %")
    axis.set_ylabel("harmful requests refused, %")
    axis.set_ylim(-3, 103)
    axis.set_title(setting)
    figure.savefig(path, dpi=150)


def curves(findings: Findings, setting: str, methods: tuple[str, ...], path: Path) -> None:
    """Draw cross-entropy and gradient norm by step: the seeds' median, and their range shaded."""
    figure, (loss, norm) = new_figure(columns=2)
    for index, name in enumerate(methods):
        group = findings.find(setting, name)
        if group is not None:
            _draw(loss, group, "cross_entropy", COLOURS[index])
            _draw(norm, group, "gradient_norm", COLOURS[index])
    norm.set_yscale("log")
    for axis, name in ((loss, "cross-entropy, nats a token"), (norm, "gradient norm, unclipped")):
        axis.set_xlabel("step")
        axis.set_ylabel(name)
    loss.legend(frameon=False)
    figure.suptitle(setting)
    figure.savefig(path, dpi=150)


def _draw(axis, group: Group, name: str, colour: str) -> None:
    runs = [_smooth(result["history"][name]) for result in group.results]
    steps = range(1, len(runs[0]) + 1)
    columns = list(zip(*runs, strict=True))
    axis.plot(steps, [statistics.median(c) for c in columns], color=colour, label=group.method)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _half(rate, side: int) -> float:
    return 100 * abs(rate.interval[side] - rate.value)
