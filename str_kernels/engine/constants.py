"""Tensors that follow from the options alone are made once for each device.

A copy from the host makes the device wait for it, so that none is made in a step.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from str_kernels.options import SafetyConstraint

ANCHORS = 8  # tokens, evenly spaced, that are looked at for the offset of a row's logits


@lru_cache(maxsize=64)
def token_ids(safety: SafetyConstraint, device: torch.device) -> Tensor:
    """``[K]`` int64."""
    return _constant(safety.token_ids, torch.int64, device)


@lru_cache(maxsize=64)
def token_weights(
    safety: SafetyConstraint, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """ω ``[K]``, or None for 1 each."""
    if safety.token_weights is None:
        return None
    return _constant(safety.token_weights, dtype, device)


@lru_cache(maxsize=64)
def anchor_ids(safety: SafetyConstraint | None, vocab: int, device: torch.device) -> Tensor:
    """``ANCHORS`` evenly spaced tokens, and the safety tokens after them: int64."""
    spaced = tuple(place * vocab // ANCHORS for place in range(ANCHORS))
    return _constant(spaced + (safety.token_ids if safety else ()), torch.int64, device)


def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made there could not be used elsewhere
        return torch.tensor(values, dtype=dtype, device=device)
