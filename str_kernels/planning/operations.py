"""Operations of a step: those of its products and of its attention; the rest is next to nothing.

Stage: an operation on meta tensors → multiplications and additions. Causal attention counts half,
for its kernels skip what lies ahead; a mask that hides more is computed in full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, mm_flop

_FORMULAS = flop_registry | {torch.ops.aten._int_mm: mm_flop}
_SCORES = "_scaled_dot_product_"  # in the names of kernels of attention
_PRODUCTS_BACK = 2.5  # of a backward by those of a forward: scores again, and four gradients


class Operations(NamedTuple):
    """The operations of a step's reference pass, and of all the rest of the step."""

    reference: int
    rest: int

    def share(self, drawn: float) -> float:
        """The reference pass's share of a step, where ``drawn`` of the sequences have one."""
        return drawn * self.reference / (drawn * self.reference + self.rest)


def operations_of(function: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> int:
    """Count one operation of aten."""
    formula = _formula(function)
    return 0 if formula is None else formula(*args, **kwargs, out_val=made)


@cache
def _formula(function: Any) -> Callable[..., int] | None:
    name = function._schema.name
    if _SCORES in name and not name.endswith("_math"):
        return partial(_attention, function)
    return _FORMULAS.get(function._overloadpacket)


def _attention(function: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    names = [x.name for x in function._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    pairs = query.shape[:-1].numel() * key.shape[-2]
    whole = 2 * pairs * (key.shape[-1] + value.shape[-1])
    times = _PRODUCTS_BACK if "backward" in function._schema.name else 1
    return round(times * (whole / 2 if given.get("is_causal") else whole))
