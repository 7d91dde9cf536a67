"""Draw the report's pictures: refusals against the task, by learning rate, and during training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.safety.findings import Findings, Group
from benchmarks.safety.probe import Point
from str_kernels.bench import style
from str_kernels.bench.style import DEFAULT

_MARKERS = "osD^vPX<>hdpH41238"


def pareto(findings: Findings, setting: str, path: Path) -> None:
    """Draw refusals against the task's accuracy, a point a method, its seeds as whiskers."""
    figure, (axis,) = style.new_figure(width=7.5, height=4.2)
    groups = findings.of(setting)
    for index, group in enumerate(sorted(groups, key=lambda g: g.method == DEFAULT)):
        if group.rate("task") is not None:
            _point(axis, group, ("task", None), _MARKERS[index % len(_MARKERS)], _seeded(group))
    style.label(axis, "x", "task accuracy, %", "higher")
    style.label(axis, "y", "harmful requests refused, %", "higher")
    axis.set_ylim(-4, 104)
    axis.set_title(f"{setting}: mean of the seeds, lowest to highest", fontsize=11)
    style.legend(figure, [axis])
    style.save(figure, path)


def balance(
    findings: Findings, settings: Sequence[str], methods: Sequence[str], path: Path
) -> None:
    """Draw refusals kept against look-alikes refused, a panel a setting, seeds as whiskers."""
    figure, axes = style.new_figure(columns=len(settings), width=3.9, height=3.6)
    for axis, setting in zip(axes, settings, strict=True):
        for index, name in enumerate(methods):
            group = findings.find(setting, name)
            if group is not None:
                _point(axis, group, ("benign", "refusal"), _MARKERS[index % len(_MARKERS)])
        style.label(axis, "x", "look-alikes refused, %", "lower")
        axis.set_ylim(-4, 104)
        axis.set_title(setting, fontsize=11)
    style.label(axes[0], "y", "harmful requests refused, %", "higher")
    style.legend(figure, axes)
    style.save(figure, path)


def curves(findings: Findings, setting: str, methods: tuple[str, ...], path: Path) -> None:
    """Draw cross-entropy, drift and gradient norm by step: median of the seeds, range shaded."""
    figure, axes = style.new_figure(columns=3, width=4.2, height=3.6)
    loss, drift, norm = axes
    for name in methods:
        group = findings.find(setting, name)
        if group is None:
            continue
        _course(loss, group, "cross_entropy")
        _course(norm, group, "gradient_norm")
        if any(any(result["history"].get("drift", ())) for result in group.results):
            _course(drift, group, "drift")
    norm.set_yscale("log")
    for axis in axes:
        axis.set_xlabel("step")
    style.label(loss, "y", "cross-entropy, nats a token", "lower")
    style.label(drift, "y", "drift of the safety logits, rms", "lower")
    style.label(norm, "y", "gradient norm, unclipped")
    figure.suptitle(setting, fontsize=11)
    style.legend(figure, axes)
    style.save(figure, path)


def by_learning_rate(findings: Findings, settings: tuple[str, ...], path: Path) -> None:
    """Draw refusals and accuracy by the learning rate of SST-2, for plain and default."""
    figure, axes = style.new_figure(columns=2, width=4.6, height=3.6)
    panels = (("harmful", "refusal", "harmful requests refused, %"), ("task", None, "accuracy, %"))
    aligned = Group("", "aligned", (next(iter(findings.aligned.values())),))
    for axis, (of, outcome, text) in zip(axes, panels, strict=True):
        (level,) = _by_seed(aligned, of, outcome)
        axis.axhline(level, color=style.colour("aligned"), ls="--", label="aligned, not tuned")
        for method in ("plain", DEFAULT):
            groups = [g for s in settings if (g := findings.find(s, method)) is not None]
            rates = [group.results[0]["run"]["setting"]["learning_rate"] for group in groups]
            found = [style.whiskers(_by_seed(group, of, outcome)) for group in groups]
            axis.errorbar(
                rates, [middle for middle, _ in found],
                yerr=list(zip(*(spread for _, spread in found), strict=True)),
                marker="o", capsize=3, color=style.colour(method), label=style.named(method),
            )  # fmt: skip
        axis.set_xlabel("learning rate of LoRA on SST-2")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.set_ylim(-4, 104)
        style.label(axis, "y", text, "higher")
    style.legend(figure, axes)
    style.save(figure, path)


def in_a_row(findings: Findings, path: Path) -> None:
    """Draw refusals after each of three fine-tunings in a row, and the drift by step."""
    figure, (refused, drift) = style.new_figure(columns=2, width=4.8, height=3.6)
    tasks: list[str] = []
    for chain in findings.chains:
        method = chain[0].method
        look = {"color": style.colour(method), "label": style.named(method)}
        steps = [len(group.results[0]["history"]["cross_entropy"]) for group in chain]
        ends = [sum(steps[: i + 1]) for i in range(len(steps))]
        shares = [_by_seed(group, "harmful", "refusal")[0] for group in chain]
        aligned = Group("", "", (next(iter(findings.aligned.values())),))
        shares = [*_by_seed(aligned, "harmful", "refusal"), *shares]
        refused.plot([0, *ends], shares, marker="o", **look)
        course = [x**0.5 for group in chain for x in group.results[0]["history"].get("drift", ())]
        if any(course):
            drift.plot(range(1, len(course) + 1), _smooth(course), **look)
        tasks = [group.results[0]["run"]["setting"]["task"] for group in chain]
    for axis in (refused, drift):
        axis.set_xlabel(f"step: {', then '.join(tasks)}")
        for end in ends[:-1]:
            axis.axvline(end, color="#999999", lw=0.8, ls=":")
    refused.set_ylim(-4, 104)
    style.label(refused, "y", "harmful requests refused, %", "higher")
    style.label(drift, "y", "drift of the safety logits, rms", "lower")
    style.legend(figure, [refused])
    style.save(figure, path)


def headline(findings: Findings, settings: dict[str, str], path: Path) -> None:
    """Draw refusals after fine-tuning: aligned, plain and default, by task."""
    figure, (axis,) = style.new_figure(width=7.5, height=3.4)
    aligned = Group("", "aligned", (next(iter(findings.aligned.values())),))
    bars = ("aligned", "plain", DEFAULT)
    names = {"aligned": "aligned, not tuned", DEFAULT: f"str_kernels: {style.named(DEFAULT)}"}
    for offset, method in enumerate(bars):
        groups = [aligned if method == "aligned" else findings.find(s, method) for s in settings]
        found = [style.whiskers(_by_seed(group, "harmful", "refusal")) for group in groups]
        places = [i + 0.27 * (offset - 1) for i in range(len(groups))]
        drawn = axis.bar(
            places, [middle for middle, _ in found], 0.25, capsize=3,
            yerr=list(zip(*(spread for _, spread in found), strict=True)),
            color=style.colour(method), label=names.get(method, style.named(method)),
        )  # fmt: skip
        for bar, (middle, (_, above)) in zip(drawn, found, strict=True):
            place = bar.get_x() + bar.get_width() / 2, middle + above + 1.5
            axis.annotate(f"{middle:.0f}", place, ha="center", fontsize=9)
    axis.set_xticks(range(len(settings)), settings.values())
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(visible=False, axis="x")
    axis.set_title("Refusals that are left after LoRA fine-tuning of Gemma 3 270M", fontsize=11)
    style.label(axis, "y", "harmful requests refused, %", "higher")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    style.save(figure, path)


def probed(found: Sequence[Point], path: Path) -> None:
    """Draw what was refused afterwards against the last probe, a point a run."""
    figure, (axis,) = style.new_figure(width=7.5, height=4.2)
    markers = dict(zip(dict.fromkeys(p.setting for p in found), cycle(_MARKERS), strict=False))
    for point in found:
        axis.plot(
            point.probe, 100 * point.refused, markers[point.setting], ms=7, alpha=0.8, ls="none",
            color=style.colour(point.method), label=style.named(point.method),
        )  # fmt: skip
    for setting, marker in markers.items():
        axis.plot([], [], marker, ms=7, ls="none", color=style.OTHER, label=setting)
    style.label(axis, "x", "last probe: refusing left, 0 to 1")
    style.label(axis, "y", "harmful requests refused, %", "higher")
    axis.set_xlim(-0.04, 1.04)
    axis.set_ylim(-4, 104)
    axis.set_title("The probe at the end of a run, and what it refuses", fontsize=11)
    style.legend(figure, [axis])
    style.save(figure, path)


def _point(
    axis: Any, group: Group, across: tuple[str, str | None], marker: str, label: str = ""
) -> None:
    """Draw a group's refusals against another share; the default is a star."""
    x, wide = style.whiskers(_by_seed(group, *across))
    y, high = style.whiskers(_by_seed(group, "harmful", "refusal"))
    default = group.method == DEFAULT
    axis.errorbar(
        x, y, xerr=[[e] for e in wide], yerr=[[e] for e in high], lw=1,
        fmt="*" if default else marker, ms=16 if default else 7,
        color=style.colour(group.method), label=label or style.named(group.method), alpha=0.9,
    )  # fmt: skip


def _by_seed(group: Group, of: str, outcome: str | None = None) -> list[float]:
    """Return the share of an outcome, or of right answers, in % of each run."""
    rates = [Group("", "", (result,)).rate(of, outcome) for result in group.results]
    return [100 * rate.value for rate in rates if rate is not None]


def _seeded(group: Group) -> str:
    return style.named(group.method) + ("" if group.runs > 1 else " (one seed)")


def _course(axis: Any, group: Group, name: str) -> None:
    runs = [_smooth(_values(result["history"], name)) for result in group.results]
    steps = range(1, len(runs[0]) + 1)
    columns = list(zip(*runs, strict=True))
    look = {"color": style.colour(group.method), "label": style.named(group.method)}
    width = 2.2 if group.method == DEFAULT else 1.2
    axis.plot(steps, [statistics.median(c) for c in columns], lw=width, **look)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axis.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)


def _values(history: dict[str, list[float]], name: str) -> list[float]:
    """Return a course; the drift on disk is a mean square."""
    return [x**0.5 for x in history[name]] if name == "drift" else history[name]


def _smooth(values: list[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
