"""Step 4: every logit exact, by each way that the backend offers, at each number of rows."""

from __future__ import annotations

import inspect

import torch

from benchmarks.gpu.run import Run, first_line
from str_kernels.backends.triton import TritonBackend
from str_kernels.bench.inputs import Case
from str_kernels.bench.truth import errors, truth_of
from str_kernels.functional import linear_cross_entropy

WAYS = ("auto", "blas", "triton")


def exact(run: Run) -> None:
    """Add forward and backward of each way; loss and gradient are checked at the most rows."""
    offered = "exact" in inspect.signature(TritonBackend).parameters
    truth = None
    for rows in run.sizes.rows:
        case = run.case(rows, run.sizes.heads[0])
        if truth is None:
            truth = truth_of(case)
        for way in WAYS:
            if not run.todo(way, case):
                continue
            if not offered and way != "triton":
                run.add(way, case, reason="this version has Triton's way alone")
                continue
            backend = TritonBackend(exact=way) if offered else TritonBackend()
            try:
                found = errors(truth, *_call(case, backend)) if rows == run.sizes.rows[0] else {}
                timing = run.timed(lambda c=case, b=backend: _call(c, b), case)
            except ValueError as error:  # a way that this torch cannot go
                run.add(way, case, reason=first_line(error))
                continue
            run.add(way, case, **found, **timing.as_row())


def _call(case: Case, backend: TritonBackend) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = case.hidden_states.detach().requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=backend, filter_eps=0.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient
