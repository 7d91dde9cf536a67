"""Turn groups of runs into a table's cells: shares with their intervals, p-values."""

from __future__ import annotations

from benchmarks.safety.findings import Group
from str_kernels.evaluation.rates import Rate


def shares(group: Group) -> list[str]:
    """Return the shares refused, over-refused and right."""
    rates = group.rate("harmful", "refusal"), group.rate("benign", "refusal"), group.rate("task")
    return [share(rate) for rate in rates]


def by_seed(group: Group) -> str:
    """Return the shares refused of each seed, in %."""
    rates = (Group("", "", (r,)).rate("harmful", "refusal") for r in group.results)
    return ", ".join(f"{100 * rate.value:.0f}" for rate in rates)


def share(rate: Rate | None) -> str:
    """Return a share and its interval in %, or nothing."""
    if rate is None:
        return ""
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def p_value(value: float | None) -> str:
    """Return a p-value, or nothing."""
    if value is None:
        return ""
    return "< 0.001" if value < 1e-3 else f"{value:.3f}"
