"""Time each head's forward and backward: pytest benchmarks/test_head_speed.py.

This is not part of the tests (`testpaths`). The error is asserted before the time is taken.
"""

from __future__ import annotations

import pytest

from str_kernels.bench.contenders import CONTENDERS
from str_kernels.bench.inputs import synthetic
from str_kernels.bench.truth import errors, truth_of

SHAPE = (512, 16384, 256)


@pytest.fixture(scope="module")
def problem():
    """Return a synthetic case and its fp64 truth."""
    case = synthetic(*SHAPE)
    return case, truth_of(case)


@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, problem, name):
    """Assert 1 % of error in the gradient, then time."""
    case, truth = problem
    contender = CONTENDERS[name]
    reason = contender.missing()
    if name == "liger" and not case.hidden_states.is_cuda:
        reason = reason or "its kernels need a GPU"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    outcome = contender.run(case)
    if name != "ours-str":  # its loss has another term
        assert errors(truth, *outcome)["hidden_error"] < 0.01
    benchmark.pedantic(contender.run, args=(case,), rounds=5, warmup_rounds=1)
