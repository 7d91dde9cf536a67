"""The constraint at each position in torch calls: its value, and its part of the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.constraint import constraint_terms, needs_lse
from str_kernels.engine.contract import Kept, Resolved, RowGradients, Statistics, Upstream
from str_kernels.engine.logits import logit_slope, outcomes
from str_kernels.engine.rows import row_blocks, silence
from str_kernels.options import LossOptions

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]``


def penalty_rows(
    options: LossOptions, statistics: Statistics, reference: Tensor, scale: Tensor
) -> Tensor:
    """Implement `RowStages.penalty`."""
    safety, values = options.safety, statistics.safety_logits
    if needs_lse(safety):
        values = outcomes(statistics)
    value = constraint_terms(safety, values, reference).value
    return torch.where(scale != 0, scale * value, 0.0)


def gradient_rows(kept: Kept, upstream: Upstream, resolved: Resolved) -> RowGradients:
    """Implement `RowStages.gradient`."""
    found = RowGradients()
    if upstream.penalty is not None:
        found = _penalty_gradients(kept, upstream.penalty, resolved)
    if not resolved.needs[0]:
        return found
    return found._replace(hidden=_hidden_gradient(kept, upstream, found, resolved))


def _penalty_gradients(kept: Kept, scale: Tensor, resolved: Resolved) -> RowGradients:
    """β ``[N, K]``, the logits' slope included, and the penalty's part of α ``[N]``."""
    safety, values = resolved.options.safety, kept.safety_logits
    if needs_lse(safety):
        values = outcomes(kept)
    terms = constraint_terms(safety, values, kept.reference)
    on = scale != 0
    beta = scale[:, None] * terms.d_logits * logit_slope(kept.safety_logits, resolved.options)
    d_lse = None if terms.d_lse is None else torch.where(on, scale * terms.d_lse, 0.0)
    return RowGradients(beta=torch.where(on[:, None], beta, 0.0), d_lse=d_lse)


def _hidden_gradient(
    kept: Kept, upstream: Upstream, found: RowGradients, resolved: Resolved
) -> Tensor:
    count, dtype = len(kept.lse), resolved.dtype
    whole = len(kept.rows) == count
    make = torch.empty if whole else torch.zeros  # a row may be in no block
    out = make((count, kept.ce_gradient.shape[1]), dtype=dtype, device=kept.lse.device)
    size, safety_rows = max(1, _SCRATCH // out.shape[1]), None
    if found.beta is not None:
        safety_rows = kept.safety_rows.to(found.beta.dtype)
    for block, rows in row_blocks(kept.rows, size, every=whole and upstream.dense is None):
        gradient = _scaled(kept.ce_gradient[block], upstream.cross_entropy[rows])
        if found.d_lse is not None:
            gradient += _scaled(kept.lse_gradient[block], found.d_lse[rows])
        if safety_rows is not None:
            gradient += found.beta[rows] @ safety_rows
        out[rows] = gradient.to(dtype)
    if safety_rows is not None:
        for rows in kept.safety_alone.split(size):
            out[rows] = (found.beta[rows] @ safety_rows).to(dtype)
    return out


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply rows ``[R, D]`` by their upstream gradients ``[R]``, in the dtype of the latter."""
    # a row with an upstream gradient of zero adds nothing, even where its logits overflowed
    return silence(gradient * upstream[:, None], upstream == 0)
