"""Forward and backward of each head by pytest-benchmark: pytest benchmarks/test_head_speed.py.

Not part of the tests (`testpaths`); the error is asserted before the time is taken.
"""

from __future__ import annotations

import pytest

from str_kernels.bench.contenders import CONTENDERS
from str_kernels.bench.inputs import synthetic
from str_kernels.bench.truth import errors, truth_of

SHAPE = (512, 16384, 256)


@pytest.fixture(scope="module")
def problem():
    """A synthetic case and its fp64 truth."""
    case = synthetic(*SHAPE)
    return case, truth_of(case)


@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, problem, name):
    """Right to 1 % in the gradient, then timed."""
    case, truth = problem
    contender = CONTENDERS[name]
    reason = contender.missing()
    if name == "liger" and not case.hidden_states.is_cuda:
        reason = reason or "its kernels need a GPU"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    outcome = contender.run(case)
    if name != "ours-str":  # whose loss is another
        assert errors(truth, *outcome)["hidden_error"] < 0.01
    benchmark.pedantic(contender.run, args=(case,), rounds=5, warmup_rounds=1)
