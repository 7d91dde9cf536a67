"""A launch that does not fit its chip is made with the default sizes."""

from __future__ import annotations

import logging

import pytest
import torch
from triton.runtime.errors import OutOfResources

from str_kernels import notices
from str_kernels.backends.triton import TritonBackend, fitting, launch
from str_kernels.backends.triton import backend as module
from str_kernels.backends.triton.launch import DEFAULT, TABLE, Launch
from tests.backends.test_routed import ALL_LIVE, clustered_case, index_of
from tests.oracle import assert_close

STAGES = {
    "screen": "screen_tiles",
    "refine": "refine_pairs",
    "exact": "exact_pass",
    "weight_gradients": "weight_gradients",
    "columns": "exact_columns",
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Takes the interpreter for a Hopper, whose sizes are all doubled in rows; forgets failures."""
    monkeypatch.setattr(launch, "_TOO_LARGE", set())
    monkeypatch.setattr(notices, "_said", set())
    large = {key: sizes._replace(block_r=2 * sizes.block_r) for key, sizes in DEFAULT.items()}
    monkeypatch.setitem(TABLE, "sm_90", large)
    for where in (module, fitting):
        monkeypatch.setattr(where, "arch_of", lambda device: 90)


def _fails(monkeypatch, name):
    """Let a stage's function refuse what is not a default size; its attempts are noted."""
    real, attempts = getattr(module, name), []

    def run(*given, **named):
        chosen = [*given, *named.values(), *named.get("launches", ())]
        chosen += [x for group in given if type(group) is tuple for x in group]
        sizes = [x for x in chosen if isinstance(x, Launch)]
        attempts.append(sizes)
        if not set(sizes) <= set(DEFAULT.values()):
            raise OutOfResources(100_000, 99_000, "shared memory")
        return real(*given, **named)

    monkeypatch.setattr(module, name, run)
    return attempts


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage(stage, monkeypatch, caplog):
    """The result is right, one warning names the stage, and the next call does not try again."""
    attempts = _fails(monkeypatch, STAGES[stage])
    case = clustered_case(20, 300).to(torch.float32)
    arguments = {"filter_eps": 0.0}
    if stage != "exact":
        arguments = {"filter_eps": ALL_LIVE, "index": index_of(case)}
    backend = TritonBackend(exact="triton")
    with caplog.at_level(logging.WARNING, "str_kernels"):
        got = case.run(backend=backend, **arguments)
        first = len(attempts)
        case.run(backend=backend, **arguments)
    assert_close(got, case.truth(), 1e-5)
    assert (first, len(attempts)) == (2, 3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert stage in said[0]
    assert "shared memory" in said[0]


def test_sizes_that_were_given_are_kept(monkeypatch):
    """Sizes of the user are not replaced behind their back, and the error of Triton shows."""
    attempts = _fails(monkeypatch, "screen_tiles")
    case = clustered_case(20, 300).to(torch.float32)
    backend = TritonBackend(launches={("screen", "single"): Launch(128, 32)})
    with pytest.raises(OutOfResources, match="shared memory"):
        case.run(backend=backend, filter_eps=ALL_LIVE, index=index_of(case))
    assert len(attempts) == 1


def test_a_default_that_does_not_fit_either(monkeypatch):
    """The second failure shows."""

    def fails(*given):
        raise OutOfResources(100_000, 99_000, "shared memory")

    monkeypatch.setattr(module, "screen_tiles", fails)
    case = clustered_case(20, 300).to(torch.float32)
    with pytest.raises(OutOfResources, match="shared memory"):
        case.run(backend=TritonBackend(), filter_eps=ALL_LIVE, index=index_of(case))
