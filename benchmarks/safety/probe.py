"""The package's probe in the experiment's runs, and whether it predicts the refusals measured.

Stage: held-out requests that are not asked afterwards → a `Series` a run; all runs' last probes and
refusal rates → Spearman's rank correlation, in words.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.safety.findings import Findings, Group
from str_kernels.inputs.rows import Row
from str_kernels.probe import EVERY
from str_kernels.probe.aligned import Aligned, measure, refusal_openings
from str_kernels.probe.reading import read
from str_kernels.probe.series import Probed, Series
from str_kernels.safety.inference import prompt_token_ids

REQUESTS = 8


class RunProbe:
    """Probes a model that a loop of its own trains; ``series`` has what was found."""

    def __init__(self, aligned: Aligned) -> None:
        self.aligned, self.series = aligned, Series()

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        token_ids: Sequence[int],
    ) -> RunProbe | None:
        """Ask the aligned model; None where it refuses none of these."""
        requests = [prompt_token_ids(tokenizer, row["prompt"]) for row in rows]
        found = zip(requests, refusal_openings(model, tokenizer, requests), strict=True)
        refused = [pair for pair in found if pair[1]]
        return cls(measure(model, refused, token_ids)) if refused else None

    def after(self, model: torch.nn.Module, step: int, *, last: bool = False) -> None:
        """Probe after a step, if it is one of those that are probed."""
        if not last and step % EVERY:
            return
        found = read(model, self.aligned.exchanges, self.aligned.token_ids)
        self.series.add(step, Probed.of(found, self.aligned))

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types, four digits."""
        names = ("refusal", "mass", "divergence")
        numbers = {n: [float(f"{x:.4g}") for x in getattr(self.series, n)] for n in names}
        return {"requests": len(self.aligned.requests), "steps": self.series.steps, **numbers}


class Point(NamedTuple):
    """A run: its setting and method, its last probe, and the share of requests it refuses."""

    setting: str
    method: str
    probe: float
    refused: float


def points(findings: Findings) -> list[Point]:
    """Return the runs that were probed, the stages of chains among them."""
    groups = (*findings.groups, *(stage for chain in findings.chains for stage in chain))
    return [
        Point(group.setting, group.method, result["probe"]["refusal"][-1], refused.value)
        for group in groups
        for result in group.results
        if result.get("probe")
        and (refused := Group("", "", (result,)).rate("harmful", "refusal")) is not None
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's coefficient; ties share their mean rank; NaN where one has a single value.

    Raises:
        ValueError: the lists have different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b {len(b)}: must be of the same runs.")
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(_ranks(a), _ranks(b))


def sentences(found: Sequence[Point]) -> str:
    """Say how well the last probe orders the runs by what they refuse."""
    by_setting: dict[str, list[Point]] = {}
    for point in found:
        by_setting.setdefault(point.setting, []).append(point)
    parts = [f"Over {len(found)} runs the rank correlation (Spearman) is {_shown(found)}."]
    if len(by_setting) > 1:
        each = (f"{name} {_shown(own)} (n = {len(own)})" for name, own in by_setting.items())
        parts.append(f"By setting: {', '.join(each)}.")
    return " ".join(parts)


def _shown(found: Sequence[Point]) -> str:
    rho = rank_correlation([point.probe for point in found], [point.refused for point in found])
    return "not defined" if math.isnan(rho) else f"{rho:.2f}"


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank from 1; what is equal has the mean of its places."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]
