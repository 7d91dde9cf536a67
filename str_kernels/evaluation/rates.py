"""Rates with their uncertainty, and when an answer is the expected one."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Rate:
    """``count`` of ``total``, which is at least 1."""

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or self.total < 1:
            raise ValueError(
                f"count={self.count}, total={self.total}: must be 0 ≤ count ≤ total, 1 ≤ total."
            )

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        """Return the share of true outcomes."""
        outcomes = [bool(outcome) for outcome in outcomes]
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """Return the share, 0 to 1."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval after Wilson, which holds near 0 and 1 and for small totals."""
        return wilson_interval(self.count, self.total)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "rate": self.value,
            "count": self.count,
            "total": self.total,
            "interval_95": list(self.interval),
        }

    def __str__(self) -> str:
        """Format it for people: ``97.5 % (195 of 200; 94.3 to 98.9)``."""
        low, high = self.interval
        return (
            f"{100 * self.value:.1f} % ({self.count} of {self.total}; "
            f"{100 * low:.1f} to {100 * high:.1f})"
        )


def wilson_interval(count: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Find every share p with ``|count/total - p| ≤ z · √(p (1 - p) / total)``."""
    share, weight = count / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def exact_match(answer: str, expected: str) -> bool:
    """Tell whether two texts are equal, ignoring case, white space and a final full stop."""
    return _bare(answer) == _bare(expected)


def _bare(text: str) -> str:
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()
    return text.removesuffix(".").strip()
