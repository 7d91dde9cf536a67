"""Device functions of the kind ``kl_mass``: the divergence of two outcomes.

The outcomes are some safety token, whose probability is the mass M, and any other token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.row_values import normaliser


@triton.jit
def cost_of(log_p, log_q):
    """Return ``q log(q/p) - q + p``, which is never negative, and sums to a divergence."""
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_p - log_q
    # e^d - 1 - d by its series, which does not cancel near 0
    series = 1.0 / 362880.0 + d * (1.0 / 3628800.0 + d * (1.0 / 39916800.0 + d / 479001600.0))
    series = 1.0 / 720.0 + d * (1.0 / 5040.0 + d * (1.0 / 40320.0 + d * series))
    series = 0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0 + d * series)))
    cost = tl.where(tl.abs(d) < 1.0, q * (d * d * series), (p - q) - q * d)
    return tl.where(q == 0.0, p, cost), p - q


@triton.jit
def held_mass(reference_ptr, stride, ones_ptr, row, on, count, TOKENS: tl.constexpr):
    """Return the reference's ``log M`` and ``log(1 - M)``, of its K + 1 columns."""
    top, log_sum = normaliser(reference_ptr, stride, ones_ptr, row, on, count, 1.0, TOKENS)
    log_mass = top + log_sum
    at = reference_ptr + row.to(tl.int64) * stride + count
    log_rest = tl.load(at, mask=on, other=0.0).to(tl.float32)
    # a reference that was rounded, as a cache rounds it, does not sum to 1
    high = tl.maximum(log_mass, log_rest)
    total = high + tl.log(tl.exp(log_mass - high) + tl.exp(log_rest - high))
    return log_mass - total, log_rest - total


@triton.jit
def mass_terms(log_mass, log_rest, its_mass, its_rest):
    """Return ``KL(M)`` and its derivative by ``log Σ exp(z)`` of the safety tokens, ``M - M_q``."""
    cost, more = cost_of(log_mass, its_mass)
    cost_rest, less = cost_of(log_rest, its_rest)
    # the difference of the smaller of two masses that sum to 1 has more decimals
    return cost + cost_rest, tl.where(tl.exp(log_rest) < 0.5, -less, more)
