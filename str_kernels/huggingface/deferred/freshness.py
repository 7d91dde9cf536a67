"""Whether a deferred value can still be computed: its operands must not have changed.

A version counter notices every in-place operation of torch except the step of a fused optimizer, so
optimizer steps are counted as well, by a hook of torch's that is global to the process. A write
through ``.data`` moves no counter (averaged weights that are swapped in, merged adapters, ``p.data
= t``, ``model.to(dtype)``), so one element of every row is compared as well.

What goes unnoticed is a write through ``.data`` that leaves the compared element of every row as it
was, and one into hidden states ``[B, T, D]``, of which none is compared.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from str_kernels.alive import SharedWhileAlive
from str_kernels.huggingface.deferred.fold import GONE
from str_kernels.huggingface.deferred.holding import is_freed


class StepClock(SharedWhileAlive):
    """Counts the steps of every optimizer, by a global hook that is removed with the clock.

    ``StepClock.shared()`` gives the one of the process. A patch keeps it alive, and so does every
    deferred value: the hook is removed as soon as nobody needs it.

    Attributes:
        count: a list with one entry, how many steps have begun.
    """

    def __init__(self) -> None:
        """Register the hook."""
        self.count = count = [0]

        def step(*_: object) -> None:  # must not refer to the clock, which it would keep alive
            count[0] += 1

        handle = register_optimizer_step_pre_hook(step)
        weakref.finalize(self, handle.remove)


class Freshness:
    """Whether tensors still contain what they contained when this was made.

    Args:
        tensors: compared by version; those of one or two dimensions by some of their values, too.
        steps: whether the step of any optimizer counts as a change.
    """

    def __init__(self, *tensors: Tensor | None, steps: bool = True) -> None:
        """Note the present state; the host does not wait for a device."""
        self._clock = StepClock.shared() if steps else None
        self._tensors = [x for x in tensors if x is not None]
        self._seen = self._versions()
        self._values = [sampled_values(x) for x in self._tensors]

    def require(self, *, values: bool = True) -> None:
        """Refuse to go on after a change.

        Args:
            values: compare values as well, for which the host waits for the device.

        Raises:
            RuntimeError: a tensor was written into, replaced or freed, or an optimizer has stepped.
        """
        if any(map(is_freed, self._tensors)):
            raise RuntimeError(GONE)
        if self._versions() != self._seen or (values and not self._same_values()):
            raise RuntimeError(
                "These logits were never computed, and the head or its input has changed since the "
                "forward (an optimizer step, averaged or merged weights, model.to()?): read "
                "outputs.logits before the step or the write."
            )

    def _versions(self) -> list:
        versions = (None if x.is_inference() else x._version for x in self._tensors)
        steps = self._clock.count[0] if self._clock is not None else 0
        return [steps, *versions, *map(_layout, self._tensors)]

    def _same_values(self) -> bool:
        pairs = zip(self._tensors, self._values, strict=True)
        return all(values is None or torch.equal(sampled_values(x), values) for x, values in pairs)


def sampled_values(tensor: Tensor) -> Tensor | None:
    """One element of every row of ``[V, D]``, each from the next column, or all of ``[V]``.

    They come as bytes, a copy, so that NaN equals itself. None for more dimensions.
    """
    tensor = tensor.detach()
    if tensor.dim() > 2:
        return None
    if tensor.dim() == 2 and tensor.shape[1]:
        rows = torch.arange(len(tensor), device=tensor.device)
        tensor = tensor[rows, rows % tensor.shape[1]]
    return tensor.flatten().clone().view(torch.uint8)


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
