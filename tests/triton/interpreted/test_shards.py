"""Triton's kernels on a part of the vocabulary in each of two processes, which gloo connects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.pool import Pool
from tests.distributed.vocabulary import losses, whole
from tests.oracle import Case, assert_close, filtered_truth, make_case

ENDS = [0, 256, 384]
OPTIONS = [{}, {"k": 3, "kind": "logprob", "softcap": 8.0}, {"label_smoothing": 0.2, "bias": True}]


@pytest.fixture(scope="module")
def ranks():
    pool = Pool()
    yield pool
    pool.stop()


def interpreted(cases: list[Case], upstream: torch.Tensor, **overrides: Any) -> list:
    """The losses, by kernels that are mended as those of this process are."""
    from benchmarks import interpreter

    interpreter.mend()
    runs = [(case, upstream, {"backend": "triton", **overrides}) for case in cases]
    return losses(runs, ENDS)


@pytest.mark.slow
def test_both_processes(ranks):
    cases = [make_case(9, ENDS[-1], 16, **options).to(torch.float32) for options in OPTIONS]
    upstream, eps = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64), 2.0**-2
    for filtered in (False, True):
        settings = {"filter_eps": eps if filtered else 0.0, "reduction": "none"}
        answers = ranks.run(interpreted, cases, upstream, **settings)
        for case, parts in zip(cases, zip(*answers, strict=True), strict=True):
            want = case.truth(upstream, reduction="none", filter_eps=0.0)
            if filtered:
                want = filtered_truth(case, upstream, eps, torch.arange(ENDS[-1]))
            assert_close(whole(list(parts)), want, 1e-4)
