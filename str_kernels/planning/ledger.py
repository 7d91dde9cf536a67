"""`Ledger` counts the bytes that are alive at every operation, and who owns them at the most.

Stage: operations on meta tensors → for every moment of the step, its most bytes by owner.

A meta tensor has a shape and no memory, so a step of any size runs here in seconds. Autograd, saved
tensors and checkpointing are torch's own; nothing about a model is assumed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from str_kernels.planning.operations import operations_of
from str_kernels.planning.shapes import Shapes

_REAL = 1 << 22  # so many integers are also computed, since models branch on them
_DEVICE, _HOST = "device", "host"
_VALUE = "_real_value"  # the attribute of a meta tensor that holds these


class Most(NamedTuple):
    """The most bytes alive at once in a moment of the step, and the owners' shares of them."""

    total: int
    owners: dict[str, int]


class Owner:
    """Some storages that are counted together; a finished owner's bytes move to another."""

    def __init__(self, name: str) -> None:
        self.name, self.bytes, self.heir = name, 0, self

    def last(self) -> Owner:
        """Who owns its storages now."""
        while self.heir is not self:
            self = self.heir
        return self


class Ledger(TorchDispatchMode):
    """Counts storages on the device and, apart from these, those that wait on the host.

    Attributes:
        moments: what runs now, by each of its names.
        most: by name of a moment, its `Most`.
        host: the most bytes that waited on the host.
        operations: of what ran, by the first word of the moment's name.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self._shapes = shapes
        self.moments: tuple[tuple, ...] = (("start",),)
        self.most: dict[tuple, Most] = {}
        self.host = 0
        self.operations: Counter[str] = Counter()
        self._now = {_DEVICE: 0, _HOST: 0}
        self._held: dict[int, tuple[weakref.ref, int, Owner, str]] = {}
        self._owners: dict[str, Owner] = {}
        self._inside: list[Owner] = []
        self.owner = self.named("start")

    def named(self, name: str) -> Owner:
        """The owner of this name."""
        return self._owners.setdefault(name, Owner(name))

    @contextmanager
    def owned(self, name: str) -> Iterator[None]:
        """What is made in this block belongs to an owner of this name."""
        before, self.owner = self.owner, self.named(name)
        try:
            yield
        finally:
            self.owner = before

    def enter(self, name: str) -> None:
        """Let what is made until `leave` have an owner of its own."""
        self._inside.append(self.owner)
        self.owner = Owner(name)

    def leave(self, heir: str) -> None:
        """Give what is left to the owner of this name."""
        left, self.owner = self.owner, self._inside.pop()
        left.heir = self.named(heir)
        left.heir.bytes, left.bytes = left.heir.bytes + left.bytes, 0

    def register(self, tensor: Tensor, owner: str) -> None:
        """Count a tensor under an owner, from now on."""
        self._count(tensor, self.named(owner), _DEVICE)

    def move(self, tensor: Tensor, owner: str) -> None:
        """Let a storage that is counted already belong to this owner."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            reference, size, before, place = self._held[key]
            before.last().bytes -= size
            self.named(owner).bytes += size
            self._held[key] = reference, size, self.named(owner), place

    def compute(self, count: int) -> None:
        """Count operations of what runs now."""
        self.operations[self.moments[0][0]] += count

    def take(self, size: int) -> None:
        """Note scratch memory that a kernel takes for itself and gives back."""
        self._note(size)

    def away(self, tensor: Tensor) -> tuple[Tensor]:
        """A copy of a tensor that waits on the host; the tuple tells it from one that stays."""
        with _disable_current_modes():
            copy = torch.empty_like(tensor, requires_grad=False)
        self._count(copy, self.named(_HOST), _HOST)
        return (copy,)

    def back(self, waiting: tuple[Tensor]) -> Tensor:
        """A copy on the device of one that waits on the host."""
        return torch.empty_like(waiting[0])

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            return _value_of(args[0]).item()
        made = self._shapes.run(function, args, kwargs)
        if count := operations_of(function, args, kwargs, made):
            self.compute(count)
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor) and x.device.type == "meta":
                self._count(x, self.owner, _DEVICE)
        if isinstance(made, Tensor) and not made.is_floating_point() and made.numel() <= _REAL:
            _compute(function, args, kwargs, made)
        return made

    def _count(self, tensor: Tensor, owner: Owner, place: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._freed(key))
        self._held[key] = reference, size, owner, place
        owner.last().bytes += size if place == _DEVICE else 0
        self._now[place] += size
        if place == _HOST:
            self.host = max(self.host, self._now[_HOST])
        else:
            self._note(0)

    def _freed(self, key: int) -> None:
        _, size, owner, place = self._held.pop(key)
        owner.last().bytes -= size if place == _DEVICE else 0
        self._now[place] -= size

    def _note(self, scratch: int) -> None:
        total = self._now[_DEVICE] + scratch
        for moment in self.moments:
            if moment not in self.most or total > self.most[moment].total:
                self.most[moment] = Most(total, self._shares(scratch))

    def _shares(self, scratch: int) -> dict[str, int]:
        shares = {self.owner.name: scratch}
        for owner in {*self._owners.values(), *self._inside, self.owner}:
            shares[owner.name] = shares.get(owner.name, 0) + owner.bytes
        return {name: size for name, size in shares.items() if size}


def _compute(function: Any, args: tuple, kwargs: dict, made: Tensor) -> None:
    """Compute the values of integers as well, if those of all operands are known."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not all(hasattr(x, _VALUE) or not x.is_meta for x in operands):
        return
    given, named = tree_map(_real, (args, kwargs))
    if not operands:
        named["device"] = torch.device("cpu")
    made._real_value = function(*given, **named)


def _real(x: Any) -> Any:
    if isinstance(x, Tensor):
        return getattr(x, _VALUE, x)
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _value_of(tensor: Tensor) -> Tensor:
    """The values of a meta tensor.

    Raises:
        NotImplementedError: they are not known.
    """
    value = getattr(tensor, _VALUE, None) if tensor.is_meta else tensor
    if value is None:
        raise NotImplementedError("its forward branches on values of its activations")
    return value
