"""The fused head's memory, by the accounting from which its backends choose their block sizes.

Stage: hidden states ``[B, N, D]`` on meta tensors → a loss, whose forward and backward take what
the operation takes: gradients of rows, statistics, and the scratch of one block of rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.torch import TorchBackend
from str_kernels.engine.contract import Head
from str_kernels.engine.logits import accumulator, kept_dtype
from str_kernels.huggingface.patch.filtering import SMALLEST_VOCABULARY
from str_kernels.options import TILE

_LOOKED_AT = 32768  # rows of the vocabulary from which its directions are learnt
_CHECKED = 11  # bytes of each of their numbers, when they are checked: twice fp32, three flags
_SPLIT = 400  # bytes of a row when it is split: 32 numbers three times, and its place twice
_STATISTICS = 40  # bytes a row: losses, log-sum-exps, masses, flags and the rows' numbers
_TABLES = 4  # of [N, K] in fp32: logits, reference, difference and gradient


class HeadShape(NamedTuple):
    """A head of V rows, with K safety tokens, on a device "cpu" or "cuda"."""

    weight: Tensor
    safety_tokens: int
    device: str


def index_bytes(shape: HeadShape) -> int:
    """The vocabulary index: an order and its inverse, and a mean row of each tile."""
    vocabulary, width = shape.weight.shape
    if vocabulary < SMALLEST_VOCABULARY:
        return 0
    return (
        16 * vocabulary + -(-vocabulary // TILE) * width * accumulator(shape.weight.dtype).itemsize
    )


def building_bytes(shape: HeadShape) -> int:
    """What building the index takes in the first loss: to learn directions, or to split rows."""
    vocabulary, width = shape.weight.shape
    if vocabulary < SMALLEST_VOCABULARY:
        return 0
    learning = _CHECKED * min(vocabulary, _LOOKED_AT) * width + 8 * width**2
    return max(learning, _SPLIT * vocabulary)


def exact_operations(hidden: Tensor, shape: HeadShape) -> int:
    """Every logit, and the rows' gradients from all of them: as if nothing were screened."""
    return 2 * (2 * hidden.numel() * shape.weight.shape[0])


def _backend(device: str) -> Any:
    if device == "cpu" or importlib.util.find_spec("triton") is None:
        return TorchBackend()
    return importlib.import_module("str_kernels.backends.triton").TritonBackend()


class FusedHead(torch.autograd.Function):
    """Stands for ``engine.autograd.FusedRows`` on meta tensors."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shape: HeadShape, scratch: Callable[[int], None]
    ) -> Tensor:
        """Keep a gradient of each row and its statistics."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        gradient = rows.new_empty(rows.shape, dtype=kept_dtype(rows.dtype))
        statistics = rows.new_empty(len(rows), _STATISTICS, dtype=torch.uint8)
        tables = rows.new_empty(len(rows), _TABLES * shape.safety_tokens, dtype=torch.float32)
        ctx.save_for_backward(gradient, statistics, tables)
        scratch(_backend(shape.device).scratch(Head(rows, shape.weight, None), len(rows)))
        ctx.shape = hidden.shape
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        """Scale the rows' gradients."""
        rows, *_ = ctx.saved_tensors
        return rows.new_empty(ctx.shape), None, None
