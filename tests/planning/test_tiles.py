"""Tiles in a plan: those in the middle need not run, and a packed body has the same modules."""

from __future__ import annotations

import pytest

from str_kernels.levers.tiles import in_tiles
from str_kernels.planning import Levers, counts
from str_kernels.planning.counts import Counter
from str_kernels.planning.subject import subject_of
from tests.planning.test_plan import EVERY, GEMMA, LLAMA, request, written


@pytest.mark.parametrize(
    ("values", "levers", "batch"),
    [
        (LLAMA | {"num_hidden_layers": 1}, EVERY, 2),
        pytest.param(LLAMA, Levers(tile_tokens=64), 1, marks=pytest.mark.slow),
        pytest.param(GEMMA, EVERY, 1, marks=pytest.mark.slow),
        pytest.param(GEMMA, Levers(tile_tokens=64, fused_head=True), 2, marks=pytest.mark.slow),
    ],
)
def test_tiles_at_both_ends_tell_the_whole(tmp_path, monkeypatch, values, levers, batch):
    """To the byte and by consumer, with a shorter last tile and without one."""
    path = written(tmp_path, values | {"vocab_size": 40})  # so that an MLP takes the most
    subject = subject_of(path, rank=4, dtype="auto")
    counted = []
    for run in (in_tiles, counts.in_few_tiles):
        monkeypatch.setattr(counts, "in_few_tiles", run)
        counter = Counter(subject, request(path, batch=batch))
        counted.append([counter.count(n, levers) for n in (384, 449)])
    assert counted[0] == counted[1]


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_packed_body_runs_in_tiles(tmp_path, form):
    """Its modules are found by the same model in floating point, whose products have values."""
    path = written(tmp_path, LLAMA | {"vocab_size": 40, "num_hidden_layers": 1})
    counter = Counter(subject_of(path, rank=4, dtype=form), request(path))
    kept = Levers(gradient_checkpointing=True, fused_head=True)
    assert counter.count(512, EVERY).total < counter.count(512, kept).total
