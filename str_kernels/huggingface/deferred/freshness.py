"""Whether a deferred value can still be computed: its operands must not have changed.

A version counter notices every in-place operation of torch except the step of a fused optimizer, so
optimizer steps are counted as well, by a hook of torch's that is global to the process.
"""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepClock:
    """Counts the steps of every optimizer, by a global hook that is removed with the clock.

    ``StepClock.shared()`` gives the one of the process. A patch keeps it alive, and so does every
    deferred value: the hook is removed as soon as nobody needs it.

    Attributes:
        count: a list with one entry, how many steps have begun.
    """

    _alive: weakref.ref[StepClock] | None = None

    def __init__(self) -> None:
        """Register the hook."""
        self.count = count = [0]

        def step(*_: object) -> None:  # must not refer to the clock, which it would keep alive
            count[0] += 1

        handle = register_optimizer_step_pre_hook(step)
        weakref.finalize(self, handle.remove)

    @classmethod
    def shared(cls) -> StepClock:
        """The clock that is alive, or a new one."""
        clock = None if cls._alive is None else cls._alive()
        if clock is None:
            clock = cls()
            cls._alive = weakref.ref(clock)
        return clock

    def __deepcopy__(self, memo: dict) -> StepClock:
        return self


class Freshness:
    """Whether tensors still contain what they contained when this was made.

    Args:
        tensors: compared by version.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        """Note the present state."""
        self._clock = StepClock.shared()
        self._tensors, self._seen = tensors, self._state(tensors)

    def require(self) -> None:
        """Refuse to go on after a change.

        Raises:
            RuntimeError: a tensor was written into, or an optimizer has stepped.
        """
        if self._state(self._tensors) != self._seen:
            raise RuntimeError(
                "These logits were never computed, and the head or its input has changed since the "
                "forward (an optimizer step?): read outputs.logits before the step."
            )

    def _state(self, tensors: tuple[Tensor | None, ...]) -> tuple:
        versions = (None if x is None or x.is_inference() else x._version for x in tensors)
        return self._clock.count[0], *versions
