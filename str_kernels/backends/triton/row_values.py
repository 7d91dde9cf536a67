"""Device functions that read each row's values of the safety tokens, and sum over them."""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import LOWEST


@triton.jit
def values_at(values_ptr, stride, row, on, token, count):
    """Return ``values [R, K]`` of these rows and tokens in fp32, 0 where they are not read."""
    at = values_ptr + row.to(tl.int64)[:, None] * stride + token[None, :]
    return tl.load(at, mask=on[:, None] & (token < count)[None, :], other=0.0).to(tl.float32)


@triton.jit
def normaliser(values_ptr, stride, omega_ptr, row, on, count, temperature, TOKENS: tl.constexpr):
    """Return the row's largest value of a token with a weight, and ``log Σ ω exp((x - top)/τ)``."""
    top = tl.full([row.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, count, TOKENS):
        token = start + tl.arange(0, TOKENS)
        omega = tl.load(omega_ptr + token, mask=token < count, other=0.0)
        x = values_at(values_ptr, stride, row, on, token, count)
        x = tl.where((omega > 0.0)[None, :], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        part = tl.sum(omega[None, :] * tl.exp((x - higher[:, None]) / temperature), 1)
        total = total * tl.exp((top - higher) / temperature) + part
        top = higher
    return top, tl.log(total)
