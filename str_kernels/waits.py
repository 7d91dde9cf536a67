"""When the host may wait for a device, and what it does where it may not.

Work on a GPU is queued: to read a value there, the host waits until the queue is empty, and then
the device is idle until the next work arrives. So the loss reads nothing there: constants are
copied to a GPU once (`constant`), and values are checked on it, for a later call to judge
(`judge_later`), unless ``STR_KERNELS_SYNC_CHECKS=1`` asks for errors at once. A number that saves
the device more than a wait costs is sent early, and read while the device has work (`Sent`).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

VARIABLE = "STR_KERNELS_SYNC_CHECKS"
_CONSTANTS = 256  # so many small tensors are kept; the least used one leaves first


def allowed(device: torch.device) -> bool:
    """Whether the host may wait for this device: on all others than a GPU nothing is queued."""
    return device.type != "cuda"


def checks_at_once(device: torch.device) -> bool:
    """Whether bad values are an error of the call that has them, not of a later one."""
    return allowed(device) or os.environ.get(VARIABLE) == "1"


@lru_cache(_CONSTANTS)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values [K]`` on a device; the tensor is shared and must not be changed.

    Only the first call copies anything there.
    """
    with torch.inference_mode(False):  # autograd cannot save a tensor made in it
        return torch.tensor(values, dtype=dtype, device=device)


class Sent(NamedTuple):
    """A number of a device that is on its way to the host.

    ``event`` is None where there is nothing to wait for.
    """

    number: Tensor
    event: torch.cuda.Event | None

    def arrived(self) -> bool:
        """Whether the host can read it without a wait."""
        return self.event is None or self.event.query()


def send(number: Tensor) -> Sent | None:
    """Copy one number to the host without a wait; None while a CUDA graph is captured."""
    if number.device.type != "cuda":
        return Sent(number.clone(), None)
    if torch.cuda.is_current_stream_capturing():
        return None
    there = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
    there.copy_(number, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(number.device))
    return Sent(there, event)


def read_sent(sent: Sent) -> int:
    """Read a number, and wait until it has arrived: only what was queued before it delays that."""
    if sent.event is not None:
        sent.event.synchronize()
    return read_arrived(sent.number)


class _Late(NamedTuple):
    """A number of bad values, and what to do if it is not zero."""

    count: Sent
    judge: Callable[[], None]


_waiting: deque[_Late] = deque()
_lock = threading.Lock()


def judge_later(bad: Tensor, judge: Callable[[], None]) -> None:
    """Have a later call run ``judge`` if ``bad``, one number on the device, is not zero.

    The number is copied without a wait. While a CUDA graph is captured nothing is judged.
    """
    count = send(bad)
    if count is not None:
        with _lock:
            _waiting.append(_Late(count, judge))


def judge_arrived() -> None:
    """Judge all numbers of earlier calls that have arrived; what a judge raises is raised here."""
    while True:
        with _lock:
            if not _waiting or not _waiting[0].count.arrived():
                return
            late = _waiting.popleft()
        if read_arrived(late.count.number):
            late.judge()


def read_arrived(count: Tensor) -> int:
    """Read a number that is on the host already."""
    return int(count.item())


class SameTensor:
    """Says when the values of a tensor should be compared again with what they were.

    Where the host may wait, each time. Elsewhere when torch knows of a change, and else every so
    many times, since a write through ``.data`` moves no version counter.

    Attributes:
        first: whether the latest comparison was the first.
    """

    def __init__(self, every: int = 100) -> None:
        """Nothing has been compared."""
        self._every = every
        self.forget()

    def forget(self) -> None:
        """Compare the next time as if it were the first."""
        self.first, self._key, self._calls = True, None, 0

    def due(self, tensor: Tensor) -> bool:
        """Count a call, and tell whether to compare in it."""
        key, known = version_key(tensor), self._key
        self.first, self._key = known is None, key
        self._calls = 0 if key != known else self._calls + 1
        return checks_at_once(tensor.device) or self._calls % self._every == 0


def version_key(tensor: Tensor) -> tuple:
    """Return where a tensor lies and what torch counts its writes by."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype
