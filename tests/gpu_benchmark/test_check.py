"""The checks in fp32 see a stage that is wrong, and pass one that is right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.check import plain_of, refine_error, screen_error
from benchmarks.gpu.stages import BOTH, StageTimes, block_of
from str_kernels.backends.torch import TorchBackend
from str_kernels.bench.inputs import synthetic

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def block():
    """Rows of a small head, through the order of its index; the last tile is ragged."""
    return block_of(synthetic(80, 1000, 32), 80, TorchBackend())


def test_right_and_wrong_screens(block):
    """A tile that is off by a nat is seen in proportion to its share."""
    backend, plain = TorchBackend(), plain_of(block)
    masses = backend.screen(block, "exact")
    assert max(screen_error(plain, masses).values()) < 1e-4
    masses.log_mass[:, 0] += 1.0
    assert min(screen_error(plain, masses).values()) > 1e-3


def test_right_and_wrong_refinements(block):
    """Mass and expected embedding are those of the live pairs, without the label."""
    backend, plain = TorchBackend(), plain_of(block)
    work = backend.route(block, backend.screen(block, "exact"), 2.0**-6)
    assert 0.0 < work.live().float().mean() < 1.0
    refined = backend.refine(block, work, BOTH)
    assert max(refine_error(plain, work, refined).values()) < 1e-4
    wrong = refined._replace(mass=refined.mass * 1.01, expected=refined.expected * 1.01)
    assert min(refine_error(plain, work, wrong).values()) > 5e-3


def test_stages_are_wrapped_and_timed(block):
    """Whatever takes a block is timed; nothing else is touched, and results stay."""
    backend = TorchBackend()
    times = StageTimes(backend, CPU)
    masses = backend.screen(block, "exact")
    backend.route(block, masses, 2.0**-6)
    backend.screen(block, "exact")
    assert backend.auto_screen(torch.bfloat16, CPU, 8) in ("exact", "int8", "bf16")
    found = times.read()
    assert set(found) == {"screen", "route"}
    assert min(found.values()) > 0
    assert times.read() == {}
