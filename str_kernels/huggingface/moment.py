"""The moment that a deferred value stands for: under which modes, and while what held still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass(frozen=True)
class Modes:
    """Grad mode and autocast, as they were when a value was recorded."""

    device: str
    grad: bool
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Modes:
        """The modes in force."""
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


class Freshness:
    """Whether tensors still hold what they held when this was made.

    Args:
        tensors: compared by version; and no optimizer may have stepped, for fused ones write
            weights without moving the version.
    """

    _steps = 0
    _counting = False

    def __init__(self, *tensors: Tensor | None) -> None:
        """Note the present state."""
        self._count_steps()
        self._tensors, self._seen = tensors, self._state(tensors)

    def require(self) -> None:
        """Raise if anything has changed.

        Raises:
            RuntimeError: the values of that moment can no longer be had.
        """
        if self._state(self._tensors) != self._seen:
            raise RuntimeError(
                "These logits were never computed, and the head or its input has changed since the "
                "forward (an optimizer step?): read outputs.logits before the step."
            )

    @staticmethod
    def _state(tensors: tuple[Tensor | None, ...]) -> tuple:
        versions = (None if x is None or x.is_inference() else x._version for x in tensors)
        return Freshness._steps, *versions

    @classmethod
    def _count_steps(cls) -> None:
        if not cls._counting:
            cls._counting = True
            register_optimizer_step_pre_hook(cls._step)

    @staticmethod
    def _step(*_: Any) -> None:
        Freshness._steps += 1
