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

_DIRECTIONS = 20  # bytes of each of D x D numbers: two matrices, and the second's eigenvectors
_BLOCK = 4096  # rows of the vocabulary that are looked at together
_TRIED = 2 * 4 * 256  # bytes of each of them beside its numbers: logits of some states, twice
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
    """What building the index takes in the first loss: its largest stage.

    They are to learn directions, to split rows, and to see which tiles are hot.
    """
    vocabulary, width = shape.weight.shape
    if vocabulary < SMALLEST_VOCABULARY:
        return 0
    wide = 4 if shape.weight.dtype == torch.float32 else 4 + shape.weight.dtype.itemsize
    tried = _BLOCK * (wide * width + _TRIED) + index_bytes(shape)
    return max(_DIRECTIONS * width**2, _SPLIT * vocabulary, tried)


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
