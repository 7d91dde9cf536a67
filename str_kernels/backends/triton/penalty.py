"""The constraint at each position: its value, and its derivatives by the safety logits.

Stage: safety logits ``[N, K]``, reference, log-sum-exp → ``λ w C [N]`` in the forward, ``β [N, K]``
in the backward, where ``gradient.py`` multiplies it by W. The formulas stand in the table of
``SafetyConstraint``. Logits of a row whose ``scale`` is zero are not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels import waits
from str_kernels.backends.triton.penalty_mass import held_mass, mass_terms
from str_kernels.backends.triton.row_values import normaliser, values_at
from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import Kept, RowGradients, Statistics
from str_kernels.options import LossOptions

_READ = ("safety", "lse", "lse_rest", "log_rest", "reference", "omega", "ones", "scale")
POINTERS = {"fp32": (*_READ, "out", "beta", "d_lse")}
# Rows of a program, and safety tokens that it takes at once.
PENALTY = {"BLOCK_R": 16, "TOKENS": 64}


@triton.jit
def log_proportion(x, top, log_sum, temperature):
    """Return ``log(p/ω)`` of ``p ∝ ω · exp(x/τ)``, which stays finite where ω is 0."""
    # a common offset of large logits leaves before they are divided, with its rounding
    return (x - top[:, None]) / temperature - log_sum[:, None]


@triton.jit
def proportion(log_p, omega):
    """Return p; the exponential may overflow where ω is 0."""
    return tl.where((omega == 0.0)[None, :], 0.0, omega[None, :] * tl.exp(log_p))


@triton.jit
def penalty_kernel(
    safety_ptr,
    lse_ptr,
    lse_rest_ptr,
    log_rest_ptr,
    reference_ptr,
    omega_ptr,
    ones_ptr,
    scale_ptr,
    out_ptr,
    beta_ptr,
    d_lse_ptr,
    rows,
    count,
    reference_stride,
    temperature,
    logit_scale,
    softcap: tl.constexpr,
    KL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program takes BLOCK_R rows.

    In: ``safety [N, K]``, ``lse [N]`` and ``lse_rest [N]``, or None for a constraint on logits,
    ``log_rest [N]`` for one that holds the mass, or None, ``reference [N, K]`` or ``[K]`` (stride
    0) of any dtype, K + 1 columns for the mass, ``omega [K]``, ``ones [K]`` and ``scale [N]``, λ w,
    in the backward times the upstream gradient; ``count`` is K. Out, 0 where ``scale`` is 0: ``out
    [N]``, ``scale · C``; ``beta [N, K]``, its derivatives by ``H Wᵀ + b``; ``d_lse [N]``, that by
    the log-sum-exp, for the mass by that of all other tokens; each of the three or None. All but
    the reference are fp32.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
    on = scale != 0.0
    if KL:
        top, log_sum = normaliser(safety_ptr, count, omega_ptr, row, on, count, temperature, TOKENS)
        its_top, its_log_sum = normaliser(
            reference_ptr, reference_stride, omega_ptr, row, on, count, temperature, TOKENS
        )
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + row, mask=on, other=0.0)
        lse_rest = tl.load(lse_rest_ptr + row, mask=on, other=0.0)
    value = tl.zeros([BLOCK_R], tl.float32)
    by_lse = tl.zeros([BLOCK_R], tl.float32)
    if log_rest_ptr is not None:
        high, above = normaliser(safety_ptr, count, ones_ptr, row, on, count, 1.0, TOKENS)
        its_mass, its_rest = held_mass(
            reference_ptr, reference_stride, ones_ptr, row, on, count, TOKENS
        )
        log_rest = tl.load(log_rest_ptr + row, mask=on, other=0.0)
        value, more = mass_terms(((high - lse) - lse_rest) + above, log_rest, its_mass, its_rest)
        by_lse = tl.where(on, -scale * more, 0.0)
    for start in range(0, count, TOKENS):
        token = start + tl.arange(0, TOKENS)
        omega = tl.load(omega_ptr + token, mask=token < count, other=0.0)
        z = values_at(safety_ptr, count, row, on, token, count)
        r = values_at(reference_ptr, reference_stride, row, on, token, count)
        if KL:
            log_p = log_proportion(z, top, log_sum, temperature)
            log_q = log_proportion(r, its_top, its_log_sum, temperature)
            q = proportion(log_q, omega)
            counted = on[:, None] & (omega > 0.0)[None, :]
            # an impossible token costs nothing, and 0 · inf is no number
            gap = tl.where(q == 0.0, 0.0, log_q - log_p)
            cost = temperature * temperature * q * gap
            slope = temperature * (proportion(log_p, omega) - q)
        else:
            distance = z - r
            if lse_ptr is not None:
                distance = ((z - lse[:, None]) - lse_rest[:, None]) - r
            counted = on[:, None] & (token < count)[None, :]
            cost = (omega / count)[None, :] * distance * distance
            slope = (2.0 * omega / count)[None, :] * distance
        value += tl.sum(tl.where(counted, cost, 0.0), 1)
        if beta_ptr is not None:
            beta = tl.where(counted, scale[:, None] * slope, 0.0)
            if log_rest_ptr is not None:
                of_mass = tl.exp((z - high[:, None]) - above[:, None])
                beta += tl.where(on[:, None], (scale * more)[:, None] * of_mass, 0.0)
            else:
                by_lse -= tl.sum(beta, 1)
            beta *= logit_scale
            if softcap is not None:
                share = z * (1.0 / softcap)
                beta *= 1.0 - share * share
            at = beta_ptr + row.to(tl.int64)[:, None] * count + token[None, :]
            tl.store(at, beta, mask=inside[:, None] & (token < count)[None, :])
    if out_ptr is not None:
        tl.store(out_ptr + row, tl.where(on, scale * value, 0.0), mask=inside)
    if d_lse_ptr is not None:
        tl.store(d_lse_ptr + row, by_lse, mask=inside)


def penalty_rows(
    options: LossOptions, statistics: Statistics, reference: Tensor, scale: Tensor
) -> Tensor:
    """Return ``λ w C [N]``; zero where ``scale [N]``, λ w, is zero."""
    out = torch.empty_like(scale)
    _constrain(options, statistics, reference, scale, out_ptr=out, beta_ptr=None, d_lse_ptr=None)
    return out


def penalty_gradients(options: LossOptions, kept: Kept, scale: Tensor) -> RowGradients:
    """Return β ``[N, K]`` and, for a kind that reads it, the derivatives by the lse ``[N]``."""
    beta = torch.empty_like(kept.safety_logits)
    d_lse = torch.empty_like(scale) if needs_lse(options.safety) else None
    _constrain(options, kept, kept.reference, scale, out_ptr=None, beta_ptr=beta, d_lse_ptr=d_lse)
    return RowGradients(beta=beta, d_lse=d_lse)


def _constrain(
    options: LossOptions,
    statistics: Statistics | Kept,
    reference: Tensor,
    scale: Tensor,
    **out: Any,
) -> None:
    safety, relative = options.safety, needs_lse(options.safety)
    ones = (1.0,) * len(safety.token_ids)
    penalty_kernel[(-(-len(scale) // PENALTY["BLOCK_R"]),)](
        statistics.safety_logits,
        statistics.lse if relative else None,
        statistics.lse_rest if relative else None,
        statistics.log_rest,
        reference.contiguous(),
        waits.constant(safety.token_weights or ones, torch.float32, scale.device),
        waits.constant(ones, torch.float32, scale.device) if options.leaves_out else None,
        scale,
        **out,
        rows=len(scale),
        count=len(safety.token_ids),
        reference_stride=reference.shape[-1] if reference.dim() > 1 else 0,
        temperature=float(safety.temperature),
        logit_scale=float(options.logit_scale),
        softcap=None if options.softcap is None else float(options.softcap),
        KL=safety.kind in ("kl", "kl_mass"),
        **PENALTY,
        num_warps=4,
    )
