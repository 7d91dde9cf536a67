"""Processes that share a vocabulary agree before a loss, so that none waits for a step of its own.

One exchange of a few numbers: what must be alike (rows, labels, settings), or the loss of all is
refused, and what each would choose by its own device and shard, of which all take the least.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Head, Resolved, RowInputs
from str_kernels.notices import say_once
from str_kernels.options import TILE, LossOptions

_PRIME = 1_000_003


class _Alike(NamedTuple):
    """What all processes need alike, as numbers."""

    positions: int
    hidden_size: int
    dtype: int
    gradients: int
    settings: int
    labels: int
    constrained: int


class _Own(NamedTuple):
    """Where a process's rows lie, and its choices; one without rows chooses nothing: inf."""

    first: int
    rows: int
    eps: float
    block: float
    entropy: bool


def agreed(resolved: Resolved, head: Head, inputs: RowInputs) -> Resolved:
    """Return how all processes of a split vocabulary run this loss; alone nothing changes.

    Raises:
        ValueError: in every process, where one has other rows, labels or settings than the rest,
            or where their shards are not the whole vocabulary.
    """
    shards, size = resolved.shards, len(head.weight)
    if shards.alone:
        return resolved
    count = len(head.hidden_states)
    block = resolved.backend.row_block(head, count, routed=resolved.eps > 0)
    choices = (resolved.eps, float(block)) if size else (float("inf"), float("inf"))
    alike, own = (
        _alike(resolved, head, inputs),
        _Own(shards.first, size, *choices, resolved.entropy),
    )
    numbers = torch.tensor([*alike, *own], dtype=torch.float64)
    rows = shards.gather(numbers.to(head.weight.device)).tolist()
    width = len(_Alike._fields)
    _refuse_unlike([_Alike(*map(int, row[:width])) for row in rows])
    others = [_Own(*row[width:]) for row in rows]
    _refuse_gaps(others, shards.total)
    tiles = sum(-(-int(other.rows) // TILE) for other in others)
    entropy = any(other.entropy for other in others)
    eps = 0.0 if entropy else min(other.eps for other in others)
    found = replace(
        resolved,
        shards=replace(shards, tiles=tiles),
        eps=eps,
        entropy=entropy,
        most_rows=int(min(other.block for other in others)),
    )
    if eps or not resolved.eps:
        return found
    say_once("str_kernels: filter_eps=0, as another process of the split vocabulary computes")
    return replace(found, screen="exact", auto=False)


def _alike(resolved: Resolved, head: Head, inputs: RowInputs) -> _Alike:
    hidden, weights = head.hidden_states, inputs.position_weights
    return _Alike(
        positions=len(hidden),
        hidden_size=hidden.shape[1],
        dtype=hidden.dtype.itemsize * 8 + (hidden.dtype == torch.bfloat16),
        gradients=sum(need << place for place, need in enumerate(resolved.needs)),
        settings=_checksum(resolved.options),
        labels=_fingerprint(inputs.labels),
        constrained=-1 if weights is None else _fingerprint(weights != 0),
    )


@lru_cache(16)
def _checksum(options: LossOptions) -> int:
    """Sum up all settings but those of the filter, on which the processes agree."""
    return zlib.crc32(repr(replace(options, filter_eps="auto", screen="auto")).encode())


def _fingerprint(values: Tensor) -> int:
    """Sum up integers so that another order gives another sum."""
    values = values.long().remainder(_PRIME)
    places = torch.arange(1, len(values) + 1, device=values.device).remainder_(_PRIME)
    return int((values * places).remainder_(_PRIME).sum())


def _refuse_unlike(found: list[_Alike]) -> None:
    for name in _Alike._fields:
        values = [getattr(one, name) for one in found]
        for rank, value in enumerate(values):
            if value != values[0]:
                what = name if name in ("labels", "constrained") else f"{name}={value}"
                raise ValueError(
                    f"shard: process {rank} of the group has other {what} than process 0: all that "
                    "share a vocabulary need the same hidden states, labels, position_weights and "
                    "settings; broadcast the batch over the group."
                )


def _refuse_gaps(found: list[_Own], total: int) -> None:
    end = 0
    for one in sorted((one for one in found if one.rows), key=lambda one: one.first):
        if one.first != end:
            break
        end = int(one.first + one.rows)
    if end != total:
        raise ValueError(
            f"shard: of total={total} rows of the head the first {end} are on one process each, "
            "and the next is on none, or on two: give each process the first of its own rows."
        )
