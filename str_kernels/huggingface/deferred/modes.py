"""Grad mode and autocast under which a deferred value was recorded, and modes of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

_PACKER = "bitsandbytes."
_LAYERS = ("Linear4bit", "Linear8bitLt")


def evaluates_otherwise(module: nn.Module) -> bool:
    """Whether the module computes otherwise in evaluation mode, so that it must stay in its mode.

    On a CPU bitsandbytes packs the weight of a 4-bit layer in its first evaluation, and training
    is wrong from then on; an 8-bit layer rounds its input in evaluation, and in training does not.
    """
    kinds = type(module).__mro__
    return any(k.__name__ in _LAYERS and k.__module__.startswith(_PACKER) for k in kinds)


@dataclass(frozen=True)
class Modes:
    """Grad mode and autocast, as they were when a value was recorded."""

    device: str
    grad: bool
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Modes:
        """The modes that are in force."""
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(device, torch.is_grad_enabled(), enabled, dtype)

    @contextmanager
    def autocast_again(self) -> Iterator[None]:
        """The recorded autocast, in this block."""
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """The recorded autocast and grad mode, in this block."""
        with torch.set_grad_enabled(self.grad), self.autocast_again():
            yield
