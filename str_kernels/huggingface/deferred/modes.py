"""Grad mode and autocast under which a deferred value was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


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
