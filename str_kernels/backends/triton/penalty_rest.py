"""The constraint ``kl_rest`` at each position: its value and its derivatives, of K + 1 outcomes.

Stage: as ``penalty.py``, with the log-probability of the rest, which is the last outcome.
"""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.row_values import normaliser, values_at

_READ = ("safety", "lse", "lse_rest", "log_rest", "reference", "ones", "scale")
# Rows of a program, and safety tokens that it takes at once.
REST = {"BLOCK_R": 8, "TOKENS": 64}
POINTERS = {"fp32": (*_READ, "out", "beta", "d_rest")}


@triton.jit
def cost_of(log_p, log_q):
    """Return ``q log(q/p) - q + p``, which is never negative, and sums to a divergence."""
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_p - log_q
    # e^d - 1 - d by its series, which does not cancel near 0
    series = 1.0 / 362880.0 + d * (1.0 / 3628800.0 + d * (1.0 / 39916800.0 + d / 479001600.0))
    series = 1.0 / 720.0 + d * (1.0 / 5040.0 + d * (1.0 / 40320.0 + d * series))
    series = 0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0 + d * series)))
    cost = tl.where(tl.abs(d) < 1.0, q * (d * d * series), (p - q) - q * d)
    return tl.where(q > 0.0, cost, p), p - q


@triton.jit
def rest_kernel(
    safety_ptr,
    lse_ptr,
    lse_rest_ptr,
    log_rest_ptr,
    reference_ptr,
    ones_ptr,
    scale_ptr,
    out_ptr,
    beta_ptr,
    d_rest_ptr,
    rows,
    count,
    reference_stride,
    logit_scale,
    softcap: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program takes BLOCK_R rows.

    In: ``safety [N, K]``, ``lse [N]``, ``lse_rest [N]``, ``log_rest [N]``, ``reference [N, K + 1]``
    or ``[K + 1]`` (stride 0) of any dtype, ``ones [K + 1]`` and ``scale [N]``, λ w, in the backward
    times the upstream gradient; ``count`` is K. Out, 0 where ``scale`` is 0: ``out [N]``, ``scale ·
    C``; ``beta [N, K]``, its derivatives by ``H Wᵀ + b``; ``d_rest [N]``, that by the log-sum-exp
    of all other tokens; either ``out`` or the other two are None. All but the reference are fp32.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
    on = scale != 0.0
    # a reference that was rounded, as a cache rounds it, does not sum to 1
    top, log_sum = normaliser(
        reference_ptr, reference_stride, ones_ptr, row, on, count + 1, 1.0, TOKENS
    )
    lse = tl.load(lse_ptr + row, mask=on, other=0.0)
    lse_rest = tl.load(lse_rest_ptr + row, mask=on, other=0.0)
    value, apart_sum = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, count, TOKENS):
        token = start + tl.arange(0, TOKENS)
        z = values_at(safety_ptr, count, row, on, token, count)
        r = values_at(reference_ptr, reference_stride, row, on, token, count)
        log_p = (z - lse[:, None]) - lse_rest[:, None]
        cost, apart = cost_of(log_p, (r - top[:, None]) - log_sum[:, None])
        counted = on[:, None] & (token < count)[None, :]
        value += tl.sum(tl.where(counted, cost, 0.0), 1)
        apart = tl.where(counted, apart, 0.0)
        apart_sum += tl.sum(apart, 1)
        if beta_ptr is not None:
            beta = scale[:, None] * apart * logit_scale
            if softcap is not None:
                share = z * (1.0 / softcap)
                beta *= 1.0 - share * share
            at = beta_ptr + row.to(tl.int64)[:, None] * count + token[None, :]
            tl.store(at, beta, mask=inside[:, None] & (token < count)[None, :])
    log_p = tl.load(log_rest_ptr + row, mask=on, other=0.0)
    at = reference_ptr + row.to(tl.int64) * reference_stride + count
    r = tl.load(at, mask=on, other=0.0).to(tl.float32)
    cost, apart = cost_of(log_p, (r - top) - log_sum)
    if out_ptr is not None:
        tl.store(out_ptr + row, tl.where(on, scale * (value + cost), 0.0), mask=inside)
    if d_rest_ptr is not None:
        # where the rest has nearly everything, the difference is that of the others
        apart = tl.where(tl.exp(log_p) < 0.5, apart, -apart_sum)
        tl.store(d_rest_ptr + row, tl.where(on, scale * apart, 0.0), mask=inside)
