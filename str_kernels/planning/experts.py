"""Routed experts on meta tensors: what transformers and PEFT call for them and meta has not.

Stage: a batch of tokens sorted by expert → products of the same sizes as on a device. Which expert
gets how many tokens changes no size, so no values are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

_META = "meta"
_PRODUCTS = ((F, "grouped_mm"), (torch, "_grouped_mm"))  # by version of torch


@contextmanager
def experts_counted() -> Iterator[None]:
    """In this block routed experts run on meta tensors, in any dtype."""
    autocast, histc = torch.autocast, torch.histc
    products = [(owner, name) for owner, name in _PRODUCTS if hasattr(owner, name)]

    def cast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager:
        return nullcontext() if device_type == _META else autocast(device_type, *args, **kwargs)

    def counts(values: Tensor, bins: int = 100, *args: Any, **kwargs: Any) -> Tensor:
        if values.device.type == _META:
            return values.new_empty(bins)
        return histc(values, bins, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, made in (
            (torch, "autocast", cast),
            (torch, "histc", counts),
            *((owner, name, _grouped(getattr(owner, name))) for owner, name in products),
        ):
            stack.enter_context(patch.object(owner, name, made))
        yield


def _grouped(kernel: Any) -> Any:
    """The product of a token with its expert's weight, one expert's standing for all."""

    def product(tokens: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tokens.device.type == _META and weights.dim() == 3:
            return tokens @ weights[0]
        return kernel(tokens, weights, *args, **kwargs)

    return product
