"""Which versions are tested together: every pair that pip can install, in few environments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, product


@dataclass(frozen=True)
class Versions:
    """What one environment is asked to hold; None leaves a package out.

    Attributes:
        triton: None is the one that torch brings.
    """

    python: str
    torch: str
    transformers: str
    peft: str
    trl: str | None
    triton: str | None = None

    def pins(self) -> dict[str, str]:
        """Return the version of each package that pip is asked for in one go."""
        named = asdict(self).items()
        return {n: v for n, v in named if v is not None and n not in ("python", "triton")}

    def pairs(self) -> set[tuple]:
        """Return every two of the versions, named."""
        return set(combinations(asdict(self).items(), 2))


NEWEST = Versions("3.11", "2.14", "5.24", "0.21", "1.16")
OLDEST = Versions("3.10", "2.8", "4.56", "0.17", None)
# Triton comes with torch, but torch's CPU build of 2.13 takes any; 3.4, 3.6 and 3.8 are in the plan
TRITONS = [Versions("3.11", "2.13", "5.24", "0.21", "1.16", triton) for triton in ("3.5", "3.7")]
# below what the metadata promise
TOO_OLD = [
    Versions("3.11", "2.6", "4.56", "0.17", "1.15"),
    Versions("3.12", "2.7", "5.24", "0.21", "1.16"),
]


def plan() -> list[Versions]:
    """Return the environments, those first that cover the most."""
    return [*_pairwise(), *TRITONS, *TOO_OLD]


def allowed() -> Iterator[Versions]:
    """Yield every combination that can be installed and imported."""
    values = (
        ("3.11", "3.10", "3.12", "3.13"),
        ("2.14", "2.8", "2.13", "2.10"),
        ("5.24", "4.56", "5.17", "5.0"),
        ("0.21", "0.17"),
        ("1.16", "1.15", None),
    )
    for row in (Versions(*found) for found in product(*values)):
        too_new = row.transformers == "5.24" or row.trl is not None
        if too_new if row.python == "3.10" else row.trl is None:
            continue  # transformers 5.21 and TRL 1.15 need Python 3.11
        if row.peft == "0.17" and row.transformers != "4.56":
            continue  # PEFT 0.17 imports what transformers 5 does not have
        yield row


def _pairwise() -> Iterator[Versions]:
    """Choose greedily: the next one has the most pairs that no other has."""
    rows = list(allowed())
    missing = set().union(*(row.pairs() for row in rows))
    first = [NEWEST, OLDEST]
    while missing:
        chosen = first.pop(0) if first else max(rows, key=lambda row: len(row.pairs() & missing))
        missing -= chosen.pairs()
        yield chosen
