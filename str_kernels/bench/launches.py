"""Count what a call asks of a device, without one: launches, waits of the host, copies to it.

A dispatch mode sees torch's operations, in the backward too, and a function mode those that read
values on the host, which on a CPU reach no dispatcher. Triton's kernels are counted where they are
launched, compiled or interpreted; what the interpreter does inside one is not counted. So a run in
the interpreter gives the counts of a GPU, as far as the code takes the same path there.

An operation of torch counts as one launch unless it makes a view or only allocates. Some have
more (``nonzero``, a sort), so the count is a lower bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from str_kernels import waits

_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
# These return only once their operands' values are known on the host.
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "repeat_interleave",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_READS = {"tolist", "numpy", "cpu", "__array__"}  # methods that copy to the host and wait
_FROM_DATA = {"tensor", "as_tensor", "new_tensor", "asarray", "from_numpy", "frombuffer"}


@dataclass
class Launches:
    """How often each operation was called, by its name.

    ``torch``: torch's operations; ``kernels``: kernels of Triton; ``waits``: what makes the host
    wait for the device; ``copies``: what copies from the host to the device.
    """

    torch: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)

    def __sub__(self, other: Launches) -> Launches:
        """Return what this call did more often than ``other``, without negative counts."""
        return Launches(*(x - y for x, y in zip(self._all(), other._all(), strict=True)))

    def totals(self) -> dict[str, int]:
        """Return the sum of each kind."""
        return {name: sum(counts.values()) for name, counts in vars(self).items()}

    def _all(self) -> tuple[Counter, ...]:
        return self.torch, self.kernels, self.waits, self.copies


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """Count what runs inside, into the record that this gives."""
    found = Launches()
    paused = [False]  # true inside a kernel, whose interpreter uses torch and numpy
    with (
        _Reads(found, paused),
        _Operations(found, paused),
        _kernels(found, paused),
        _unseen("read_arrived", paused),
        _unseen("read_sent", paused, found.waits),
    ):
        yield found


class _Operations(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self, found: Launches, paused: list[bool]) -> None:
        super().__init__()
        self.found, self.paused = found, paused

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused[0]:
            self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = func._schema.name.split("::")[-1]
        if func._schema.name.startswith("profiler::"):
            return
        if name in _WAITS or (name in _INDEXING and _has_mask(args)):
            self.found.waits[name] += 1
        elif name in ("_to_copy", "copy_") and _crosses(args, result, kwargs):
            there = result.device.type == "cpu"
            (self.found.waits if there else self.found.copies)[name] += 1
        elif name not in _ALLOCATIONS and not _is_view(func):
            self.found.torch[name] += 1


class _Reads(TorchFunctionMode):
    """Counts what a dispatcher does not see on a CPU: reads of values, and tensors made of data."""

    def __init__(self, found: Launches, paused: list[bool]) -> None:
        super().__init__()
        self.found, self.paused = found, paused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.paused[0]:
            if name in _READS or (name == "to" and _moves_to_host(args, kwargs)):
                self.found.waits[name] += 1
            elif name in _FROM_DATA and _is_data(args, kwargs, name):
                self.found.copies[name] += 1
        return func(*args, **kwargs)


@contextmanager
def _unseen(name: str, paused: list[bool], calls: Counter | None = None) -> Iterator[None]:
    """Count nothing inside one function of `waits`, but its calls where a counter is given."""
    real = getattr(waits, name)

    def call(*args: Any) -> Any:
        before, paused[0] = paused[0], True
        if calls is not None:
            calls[name] += 1
        try:
            return real(*args)
        finally:
            paused[0] = before

    setattr(waits, name, call)
    try:
        yield
    finally:
        setattr(waits, name, real)


@contextmanager
def _kernels(found: Launches, paused: list[bool]) -> Iterator[None]:
    """Count launches of Triton's kernels, where Triton is installed."""
    try:
        from triton.runtime import JITFunction
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        yield
        return
    # before Triton 3.5 an interpreted function makes its `run` anew
    kinds = [kind for kind in (JITFunction, InterpretedFunction) if hasattr(kind, "run")]
    real = {kind: kind.run for kind in kinds}

    def counting(kind: type) -> Any:
        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup"):
                found.kernels[kernel.fn.__name__] += 1
            before, paused[0] = paused[0], True
            try:
                return real[kind](kernel, *args, **kwargs)
            finally:
                paused[0] = before

        return run

    for kind in kinds:
        kind.run = counting(kind)
    try:
        yield
    finally:
        for kind in kinds:
            kind.run = real[kind]


def _is_view(func: Any) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    views = [info for info in returns if info is not None and not info.is_write]
    return bool(views) or func._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias")


def _has_mask(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 else ()
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _crosses(args: tuple, result: Any, kwargs: dict) -> bool:
    """Whether a copy is from one device to another, and waits for it."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
    return source.device != result.device and (waits or result.device.type != "cpu")


def _moves_to_host(args: tuple, kwargs: dict) -> bool:
    asked = [*args[1:], kwargs.get("device")]
    devices = [x for x in asked if isinstance(x, str | torch.device)]
    return any(torch.device(x).type == "cpu" for x in devices) and not kwargs.get("non_blocking")


def _is_data(args: tuple, kwargs: dict, name: str) -> bool:
    """Whether a tensor is made of numbers of the host; a scalar tensor of torch is a fill."""
    given = args[1] if name == "new_tensor" and len(args) > 1 else (args or [None])[0]
    return not isinstance(given, Tensor)
