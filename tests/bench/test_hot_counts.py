"""Bounds on what was counted on real text with the index's hot tiles."""

from __future__ import annotations

import pytest

from benchmarks.common import RESULTS
from str_kernels.bench.report import SCHEMA, read_rows
from str_kernels.options import TILE

ROWS = [
    row
    for row in read_rows(RESULTS / "counted.jsonl", SCHEMA)[1]
    if row["head"] == "frozen" and row.get("hot")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['case']}, {row['screen']}")
def test_hot_tiles_spare_atomics(row):
    """At most one tile in 32 is hot; they hold a fifth of the live pairs, or more, and those add
    nothing by atomics; with 8 bits the whole stays within the goal of 0.75 products.
    """
    rows, vocab, dim, _ = row["shape"]
    tiles = -(-vocab // TILE)
    assert row["hot"] <= tiles // 32
    assert row["hot_live"] > 0.2
    (refine,) = (stage for stage in row["stages"] if stage["stage"] == "refine")
    cold = row["live"] * (1 - row["hot_live"]) * rows * tiles
    assert refine["added"] == pytest.approx(cold * (4 * dim + 8), rel=1e-5)
    assert row["gemms"] < (1.25 if row["screen"] == "exact" else 0.75)


def test_something_was_counted():
    """A file without routed rows would pass."""
    assert {row["screen"] for row in ROWS} == {"exact", "int8", "fp8"}
