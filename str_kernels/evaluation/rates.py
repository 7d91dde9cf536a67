"""Shares of a count with their uncertainty."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Rate:
    """``count`` of ``total``, at least one."""

    count: int
    total: int

    def __post_init__(self) -> None:
        """Check that the count lies within the total."""
        if not 0 <= self.count <= self.total or self.total < 1:
            raise ValueError(
                f"count={self.count}, total={self.total}: must be 0 ≤ count ≤ total, 1 ≤ total."
            )

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        """The share of true ones."""
        outcomes = [bool(outcome) for outcome in outcomes]
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """The share itself, 0 to 1."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval after Wilson: sensible near 0 and 1 and for small totals."""
        return wilson_interval(self.count, self.total)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rate": self.value,
            "count": self.count,
            "total": self.total,
            "interval_95": list(self.interval),
        }

    def __str__(self) -> str:
        """For people: ``97.5 % (195 of 200; 94.3 to 98.9)``."""
        low, high = self.interval
        return (
            f"{100 * self.value:.1f} % ({self.count} of {self.total}; "
            f"{100 * low:.1f} to {100 * high:.1f})"
        )


def wilson_interval(count: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval: every share p with ``|count/total - p| ≤ z · √(p (1 - p) / total)``."""
    share, weight = count / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value that two runs on the same rows are equally often true.

    Only rows where the runs differ tell anything: of ``n`` of them, the number where ``a`` is true
    is binomial with share 1/2 if there is no difference.

    Args:
        a: outcomes of one run, a row each.
        b: outcomes of the other, in the same order.

    Raises:
        ValueError: runs of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} outcomes and b {len(b)}: must be of the same rows.")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are equal but for case, white space, and a full stop at the end."""
    return _bare(answer) == _bare(expected)


def _bare(text: str) -> str:
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()
    return text.removesuffix(".").strip()
