"""Distributed data parallel: every process has a part of the batch, and the model whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.nn.parallel import DistributedDataParallel

from str_kernels import patch_model
from tests.distributed.models import KINDS, Case, Found, assert_right, step

pytestmark = pytest.mark.one_in(4)


def wrapped(case: Case, **settings) -> Found:
    model = case.model()
    patch_model(model, case.safety, positions=case.positions if case.safety else "all")
    return step(case, DistributedDataParallel(model, **settings))


@pytest.mark.parametrize(
    "unused", [pytest.param(False, marks=pytest.mark.slow), True]
)  # PEFT's setting in transformers clones outputs
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop(ranks, kind, unused):
    case = Case(kind)
    assert_right(ranks.run(wrapped, case, find_unused_parameters=unused), case.truth())


@pytest.mark.parametrize("positions", ["labels", 2])
def test_positions(ranks, positions):
    case = Case(positions=positions)
    assert_right(ranks.run(wrapped, case), case.truth())


def test_a_process_without_labels(ranks):
    """It waits for nobody, and its penalty is none."""
    case = replace(Case(), labels=(0, 0, 8, 10))
    assert_right(ranks.run(wrapped, case), case.truth())
