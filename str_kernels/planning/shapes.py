"""`Shapes` remembers what operations on meta tensors returned: torch computes it in Python, slowly.

Stage: an operation and the shapes of its operands → results as torch made them the first time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)


class _Shape(tuple):
    """What makes a new meta tensor: its shape, its strides and its dtype."""

    def made(self) -> Tensor:
        shape, stride, dtype = self
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class Shapes:
    """Runs operations; one that only makes new tensors runs once for equal operands."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._new: dict[Any, bool] = {}

    def run(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``."""
        key = self._key(function, args, kwargs)
        if key is None:
            return function(*args, **kwargs)
        found = self._made.get(key)
        if found is not None:
            return _made(found)
        made = function(*args, **kwargs)
        if _told(made):
            self._made[key] = tree_map(_shape, made)
        return made

    def _key(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the result depends on; None: it is not to be remembered."""
        new = self._new.get(function)
        if new is None:
            schema = function._schema  # an alias is a view or an operand that is written
            new = not any(x.alias_info for x in (*schema.arguments, *schema.returns))
            self._new[function] = new
        if not new:
            return None
        parts: list[Any] = [function]
        told = _add(parts, args) and (not kwargs or _add(parts, sorted(kwargs.items())))
        return tuple(parts) if told else None


def _add(parts: list[Any], value: Any) -> bool:
    """Add what tells a value to ``parts``; False: nothing does."""
    if isinstance(value, Tensor):
        parts.append((value.shape, value.stride(), value.dtype, value.device))
        return not value.is_complex()
    if isinstance(value, (tuple, list)):
        parts.append(len(value))
        return all(_add(parts, x) for x in value)
    parts.append((type(value), value))  # 1, 1.0 and True are equal, and make different dtypes
    return isinstance(value, _PLAIN)


def _told(made: Any) -> bool:
    """Whether a result is tensors whose storages are no larger than they say, and plain values."""
    if isinstance(made, (tuple, list)):
        return all(map(_told, made))
    if not isinstance(made, Tensor):
        return isinstance(made, _PLAIN)
    storage = made.untyped_storage()
    return made.is_meta and storage.nbytes() == _shape(made).made().untyped_storage().nbytes()


def _shape(x: Any) -> Any:
    return _Shape((x.shape, x.stride(), x.dtype)) if isinstance(x, Tensor) else x


def _made(found: Any) -> Any:
    if isinstance(found, _Shape):
        return found.made()
    if isinstance(found, (tuple, list)):
        return type(found)(map(_made, found))
    return found
