"""Layers of one structure are counted two at a time, and the rest follows.

Stage: a model's list of layers → two depths whose step is counted, such that the step of the whole
model is exactly theirs, continued: every moment of a step is linear in the number of equal layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from str_kernels.planning.ledger import Most

_SIMPLE = (int, float, str, bool, type(None))
_MOMENT = "backward"  # moments of its layers are pairs ("backward", place)


class Depths(NamedTuple):
    """Two numbers of layers to count, and the number that there are; equal: count them all."""

    few: int
    more: int
    every: int


def layers_of(model: nn.Module, config: Any) -> nn.ModuleList | None:
    """The list of the model's layers, if there is one as long as the configuration says."""
    count = getattr(config, "num_hidden_layers", None)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def depths_of(layers: nn.ModuleList, config: Any) -> Depths:
    """The fewest layers that tell the whole: equal ones, or a pattern that repeats."""
    kinds, every = _kinds(layers, config), len(layers)
    for period in range(1, every):
        if all(kinds[i] == kinds[i + period] for i in range(every - period)):
            few = max(2 * period, 3)  # so that a layer at either end has an equal one inside
            few += (every - few) % period
            if 2 * few + period < every:
                return Depths(few, few + period, every)
    return Depths(every, every, every)


@contextmanager
def shortened(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """In this block the list has its first ``count`` layers only."""
    every = layers._modules
    layers._modules = dict(list(every.items())[:count])
    try:
        yield
    finally:
        layers._modules = every


def whole(few: dict[Any, Most], more: dict[Any, Most], depths: Depths) -> dict[Any, Most]:
    """The moments of the whole model's step, from those at two depths."""
    if depths.few == depths.every:
        return few
    inside = (depths.few - 1) // 2  # layers beyond it stand elsewhere in a deeper model
    kept = [key for key in few if key in more and (key[0] != _MOMENT or key[-1] <= inside)]
    return {key: _line(few[key], more[key], depths) for key in kept}


def places(layer: int, count: int) -> tuple[tuple, ...]:
    """The moments of a layer's backward: its place from the first layer and from the last."""
    return (_MOMENT, "first", layer), (_MOMENT, "last", count - 1 - layer)


def line(few: int, more: int, depths: Depths) -> int:
    """A number of the whole model's, from those at two depths."""
    if depths.few == depths.every:
        return few
    return few + (more - few) * (depths.every - depths.few) // (depths.more - depths.few)


def _line(few: Most, more: Most, depths: Depths) -> Most:
    names = few.owners.keys() | more.owners.keys()
    pairs = {name: (few.owners.get(name, 0), more.owners.get(name, 0)) for name in names}
    owners = {name: line(a, b, depths) for name, (a, b) in pairs.items()}
    return Most(line(few.total, more.total, depths), owners)


def _kinds(layers: nn.ModuleList, config: Any) -> list[tuple]:
    """What each layer is made of, and what it is told."""
    told = [_attributes(layer) for layer in layers]
    numbered = {key for key in told[0] if all(given.get(key) == i for i, given in enumerate(told))}
    lists = [x for x in config.to_dict().values() if isinstance(x, list) and len(x) == len(layers)]
    return [
        (
            tuple(type(m) for m in layer.modules()),
            tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()),
            tuple(sorted((k, repr(v)) for k, v in told[i].items() if k not in numbered)),
            tuple(repr(x[i]) for x in lists),
        )
        for i, layer in enumerate(layers)
    ]


def _attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (name, key): value
        for name, module in layer.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, _SIMPLE)
    }
