"""A vocabulary whose rows lie on several processes: who has which, and what they exchange.

Every process has all N hidden states and labels, and V_r rows of the head. Its stages sum over its
own tokens; sums and maxima over the processes stand at the borders of the stages (`engine.joins`),
so that statistics and loss are the same on all of them. One process alone has the whole vocabulary,
and exchanges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed

from str_kernels import waits
from str_kernels.options import SafetyConstraint


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of a head that this process has; ``weight [V_r, D]`` and ``bias [V_r]`` are its own.

    The rows of all processes of the group, one after the other, are the head; a process may have
    none. Hidden states, labels and all other arguments of the loss are the same on all of them, and
    so are the loss and the gradient of the hidden states, which is the whole one. A weight that is
    a ``DTensor`` with the placement ``Shard(0)`` needs no ``VocabularyShard``.

    Args:
        group: the processes that share the head, a ``torch.distributed.ProcessGroup``; None: all.
        first: the token of this process's first row.
        total: V, the rows of the whole head.

    Raises:
        ValueError: ``first`` or ``total`` is no whole number, or out of range.
    """

    group: Any
    first: int
    total: int

    def __post_init__(self) -> None:
        for name, least in (("total", 1), ("first", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number, {least} or more.")
        if self.first > self.total:
            raise ValueError(
                f"first={self.first}: must be at most total={self.total}, the rows of the head."
            )


@dataclass(frozen=True)
class Shards:
    """What the engine knows of a split vocabulary; without a group (`ALONE`) there is no split.

    ``total`` is V, ``size`` V_r, and ``tiles`` the tiles of all processes, once they have agreed;
    alone these are 0, and the head itself tells.
    """

    group: Any = None
    first: int = 0
    total: int = 0
    size: int = 0
    tiles: int = 0

    @property
    def alone(self) -> bool:
        """Whether this process has the whole vocabulary."""
        return self.group is None

    def sum(self, values: Tensor) -> Tensor:
        """Add up over the processes; it may overwrite ``values``."""
        return self._reduce(values, "SUM")

    def max(self, values: Tensor) -> Tensor:
        """Take the largest over the processes; it may overwrite ``values``."""
        return self._reduce(values, "MAX")

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag is true on any process."""
        return flags if self.alone else self.max(flags.int()) > 0

    def gather(self, values: Tensor) -> Tensor:
        """Stack what each process has, in the order of ranks: ``[C]`` → ``[P, C]``."""
        if self.alone:
            return values[None]
        found = [torch.empty_like(values) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(found, values, group=self.group)
        return torch.stack(found)

    def own(self, labels: Tensor) -> Tensor:
        """Turn labels into rows of this process; -1 where it does not have the row."""
        if self.alone:
            return labels
        own = labels - self.first
        return torch.where((own >= 0) & (own < self.size), own, labels.clamp(max=-1))

    def tokens(self, safety: SafetyConstraint, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which of the K safety tokens this process has, and their rows; both int64."""
        places, rows = _owned(safety.token_ids, self.first, self.size)
        return tuple(waits.constant(x, torch.int64, device) for x in (places, rows))

    def part(self, safety: SafetyConstraint | None) -> SafetyConstraint | None:
        """A constraint of this process's tokens alone, for stages that read their columns of W."""
        if self.alone or safety is None:
            return safety
        _, rows = _owned(safety.token_ids, self.first, self.size)
        return SafetyConstraint(rows, kind="mse") if rows else None

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        if self.alone:
            return values
        values = values.contiguous()
        distributed.all_reduce(values, getattr(distributed.ReduceOp, how), group=self.group)
        return values


ALONE = Shards()


def shards_of(shard: VocabularyShard | None, rows: int) -> Shards:
    """Return what the engine knows of a head of which this process has so many rows.

    Raises:
        ValueError: there are no processes, or the rows are not those of the head.
    """
    if shard is None:
        return ALONE
    if not isinstance(shard, VocabularyShard):
        raise ValueError(f"shard={shard!r}: must be a VocabularyShard or None.")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"shard={shard!r}: torch.distributed has no process group; call "
            "torch.distributed.init_process_group first, or leave shard out."
        )
    if shard.first + rows > shard.total:
        raise ValueError(
            f"shard.first={shard.first}, and the weight has {rows} rows: must end at "
            f"total={shard.total} or before."
        )
    group = distributed.group.WORLD if shard.group is None else shard.group
    if distributed.get_world_size(group) == 1 and rows == shard.total:
        return ALONE
    return Shards(group, shard.first, shard.total, rows)


@lru_cache(64)
def _owned(
    token_ids: tuple[int, ...], first: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the places among the K tokens, and the rows, of those that a process has."""
    own = [(k, token - first) for k, token in enumerate(token_ids) if 0 <= token - first < size]
    return tuple(k for k, _ in own), tuple(row for _, row in own)
