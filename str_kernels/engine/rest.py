"""Sums over the vocabulary leave the safety tokens out where a constraint reads those of the rest.

Stage: ``Head`` → the same with `LEFT_OUT` as the safety tokens' bias, which every pass over the
vocabulary takes as a logit of -inf; ``RowSums`` of the rest, safety logits → ``Joined``, `Rest`.
The probability of the rest may be near 0 or 1, and its gradient is divided by it: a difference of
sums would lose their digits. The safety logits are computed apart anyway, and are joined here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from str_kernels.engine.contract import (
    LEFT_OUT,
    Block,
    Coefficients,
    Head,
    Joined,
    Kept,
    OpenRows,
    Rest,
    RowSums,
)
from str_kernels.engine.logits import (
    accumulator,
    log_probabilities,
    logit_slope,
    safety_ids,
    weight_rows,
)
from str_kernels.engine.shards import Shards
from str_kernels.options import LossOptions

Join = Callable[[Block, Tensor, RowSums], Joined]


def leave_out(head: Head, options: LossOptions, shards: Shards) -> Head:
    """Mark the safety tokens by their bias, if the options leave them out."""
    if not options.leaves_out:
        return head
    dtype, device = accumulator(head.hidden_states.dtype), head.weight.device
    none = torch.zeros(len(head.weight), dtype=dtype, device=device)
    bias = none if head.bias is None else head.bias.detach().to(dtype)
    return head._replace(bias=bias.index_fill(0, _rows_of(options, shards, device)[1], LEFT_OUT))


def _rows_of(
    options: LossOptions, shards: Shards, device: torch.device
) -> tuple[Tensor | slice, Tensor]:
    """Which of the K safety tokens this process has, and their rows of the head."""
    if shards.alone:
        return slice(None), safety_ids(options.safety, device)
    return shards.tokens(options.safety, device)


def left_out(bias: Tensor | None, options: LossOptions) -> Tensor | None:
    """Tell which tokens of a bias are left out; None where the options leave out none."""
    return bias == LEFT_OUT if options.leaves_out else None


def of_safety(labels: Tensor, options: LossOptions) -> Tensor:
    """``[R, K]`` bool: which safety token is a row's label, a row of the whole head."""
    return labels[:, None] == safety_ids(options.safety, labels.device)


def join_all(join: Join, block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
    """Join label and, where they are left out, the safety tokens to the sums of R rows."""
    if not block.options.leaves_out:
        return join(block, label_logit, sums)
    z, own = block.columns.safety, of_safety(block.labels, block.options)
    others = z.masked_fill(own, -torch.inf)
    rest = _Rest(block, label_logit, sums, own.any(-1))
    top = others.amax(-1)
    # the largest is taken out, so that no exponential overflows
    shift = torch.maximum(rest.shift, torch.where(top.isfinite(), top, rest.shift))
    fall = rest.shift - shift
    rescale, exponentials = torch.exp(fall), torch.exp(others - shift[:, None])
    weighted = sums.weighted
    if weighted is not None:
        of_rest = (weighted + sums.mass * fall) * rescale
        below = torch.where(exponentials > 0, others - shift[:, None], 0.0)
        weighted = of_rest + (exponentials * below).sum(-1)
    joined = join(
        block,
        label_logit,
        sums._replace(
            shift=shift,
            mass=sums.mass * rescale + exponentials.sum(-1),
            maximum=torch.maximum(sums.maximum, top),
            dead=None if sums.dead is None else sums.dead * rescale[:, None],
            weighted=weighted,
        ),
    )
    # log(p / (1 - p)) of all safety tokens: neither probability comes from a difference
    odds = torch.logsumexp(z - rest.shift[:, None], -1) - rest.log_sum
    statistics = joined.statistics._replace(log_rest=-torch.logaddexp(odds, torch.zeros_like(odds)))
    factors, keep = joined.factors, None
    if factors is not None:
        factors = factors._replace(opened=factors.opened * rescale)
    if sums.kept is not None:
        keep = torch.where(sums.kept > 0, sums.exact / sums.kept, 1.0)
    return joined._replace(
        statistics=statistics,
        rescale=joined.rescale * rescale,
        scale=joined.scale * rescale,
        factors=factors,
        rest=Rest(rest.log_sum, rest.label, exponentials * joined.rescale[:, None], keep),
    )


class _Rest:
    """The sums of the rest with the label, which is no safety token, in logarithms."""

    def __init__(self, block: Block, label_logit: Tensor, sums: RowSums, own: Tensor) -> None:
        mass = sums.mass if sums.dead is None else sums.mass + sums.dead.sum(-1)
        inside = (block.labels >= 0) & ~own
        # a rest of the label alone has no other logit to be relative to
        alone = inside & (mass == 0)
        self.shift = torch.where(alone, label_logit, sums.shift)
        gap = torch.where(inside, label_logit - self.shift, -torch.inf)
        self.log_sum = torch.logaddexp(mass.log(), gap)
        self.label = torch.where(inside, torch.exp(gap - self.log_sum), 0.0)


def safety_logit_sum(block: Block, label_logit: Tensor) -> Tensor:
    """``Σ_k (z_k - z_y) [R]``, which an exact pass has left out of label smoothing's sum."""
    places, _ = _rows_of(block.options, block.shards, label_logit.device)
    return (block.columns.safety[:, places] - label_logit[:, None]).sum(-1)


def safety_part(block: Block, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """``Σ_k factor_k · ∂z_k/∂h [R, D]``; ``factors [R, K]``."""
    options = block.options
    places, ids = _rows_of(options, block.shards, factors.device)
    factors = (factors * logit_slope(block.columns.safety, options))[:, places]
    return factors @ weight_rows(block.head, ids, dtype)


def rest_rows(opened: OpenRows, rest: Rest, options: LossOptions) -> OpenRows:
    """The opened gradient of the rest's log-sum-exp, without the label's own term."""
    scale = options.logit_scale * torch.exp(-rest.log_sum)
    return opened._replace(scale=scale if rest.keep is None else scale * rest.keep)


def safety_factors(
    kept: Kept,
    labels: Tensor,
    coefficients: Coefficients,
    rows: Tensor | slice,
    options: LossOptions,
) -> Tensor:
    """Derivatives ``[N, K]`` of the cross-entropy by ``H Wᵀ + b`` at the safety tokens.

    The gradient of a weight leaves them out, like every pass. ``labels [N]``; `Coefficients` of N
    rows, but for the constraint's part of α; ``rows``: those that `Kept.open_mass` is of.
    """
    alpha, gamma, sigma = coefficients
    open_mass = torch.ones_like(alpha)
    open_mass[rows] = kept.open_mass
    dz = alpha[:, None] * log_probabilities(kept.safety_logits, kept).exp()
    # α p_y - γ, where p_y = 1 - open mass, so that a confident row does not lose its digits
    at_label = (alpha - gamma) - alpha * open_mass
    dz = torch.where(of_safety(labels, options), at_label[:, None], dz)
    # without a softcap the passes subtract σ at every token, also at those that they leave out
    if sigma is not None and options.softcap is not None:
        dz = dz - sigma[:, None]
    silent = (alpha == 0) & (gamma == 0)
    dz = dz * logit_slope(kept.safety_logits, options)
    return dz.masked_fill(silent[:, None], 0.0)


def by_dense(d_lse: Tensor | None, kept: Kept) -> Tensor | None:
    """The constraint's part of α ``[N]``, the factor of a dense token's ``exp(z - lse)``."""
    if d_lse is None or kept.log_rest is None:
        return d_lse
    # a rest without any probability has no gradient, which infinity would make NaN
    by_lse = d_lse * torch.exp((-kept.log_rest).clamp(max=80.0))
    return torch.where(d_lse == 0, 0.0, by_lse)
