"""Refine computes the live pairs from the original operands, in fp32.

Stage: ``Worklist`` → ``Refined``. The number of live rows differs much between tiles, so there are
three ways: *hot* tiles, live for most rows, are multiplied with every row, several tiles at a time,
and their dead pairs are masked, so that no row is gathered; *cold* ones are batched, padded to the
same few rows; the others are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Block, Refined, Wanted, Worklist
from str_kernels.engine.logits import (
    accumulator,
    finish_logits,
    softcap_slope,
    take_rows,
    weight_rows,
)
from str_kernels.engine.products import product, products
from str_kernels.engine.rest import left_out
from str_kernels.engine.tiles import positions_of
from str_kernels.options import TILE

_HOT_SHARE = 0.5  # of the rows: from here on gathering costs more than it saves
_HOT_TILES = 4  # at a time
_COLD_ROWS = 32  # at most; one small product is mostly overhead


class _Group(NamedTuple):
    """G tiles with P rows each: ``tiles [G]``, ``rows [G, P]``, ``live [G, P]`` or None for all."""

    tiles: Tensor
    rows: Tensor
    live: Tensor | None


def refine_pairs(block: Block, work: Worklist, wanted: Wanted, cold_bytes: int) -> Refined:
    """Return ``Refined`` of R rows; a batch of cold tiles has ``cold_bytes`` of weight rows."""
    sums = _Sums(block, work, wanted)
    counts = work.counts.tolist()
    lists = work.rows.split(counts)
    hot_from = max(_COLD_ROWS + 1, _HOT_SHARE * len(block.labels))
    hot = [tile for tile, count in enumerate(counts) if count >= hot_from]
    for start in range(0, len(hot), _HOT_TILES):
        sums.add_hot(hot[start : start + _HOT_TILES], lists)
    for tile, count in enumerate(counts):
        if _COLD_ROWS < count < hot_from:
            sums.add(_Group(work.rows.new_tensor([tile]), lists[tile][None], None))
    cold = [tile for tile, count in enumerate(counts) if 0 < count <= _COLD_ROWS]
    cold.sort(key=counts.__getitem__)
    for group in _cold_groups(cold, counts, lists, max(1, cold_bytes // sums.tile_bytes)):
        sums.add(group)
    return Refined(sums.mass, sums.expected, sums.maximum)


def _cold_groups(
    cold: list[int], counts: list[int], lists: tuple[Tensor, ...], size: int
) -> Iterator[_Group]:
    """Batch ``size`` tiles of similar counts, so that little is padded."""
    for start in range(0, len(cold), size):
        batch = cold[start : start + size]
        rows = torch.nn.utils.rnn.pad_sequence([lists[tile] for tile in batch], batch_first=True)
        live = rows.new_tensor([counts[tile] for tile in batch])[:, None]
        live = torch.arange(rows.shape[1], device=rows.device) < live
        yield _Group(rows.new_tensor(batch), rows, live)


class _Sums:
    """Each row's sums over its live pairs."""

    def __init__(self, block: Block, work: Worklist, wanted: Wanted) -> None:
        head, labels, tiles, options = block[:4]
        self.head, self.order, self.options, self.shift = head, tiles.order, options, work.shift
        self.hidden = head.hidden_states.to(accumulator(head.hidden_states.dtype))
        self.positions = positions_of(labels, tiles.inverse)
        self.mass = torch.zeros_like(work.shift)
        self.maximum = torch.full_like(self.mass, float("-inf"))
        self.expected = torch.zeros_like(self.hidden) if wanted.hidden else None
        self.tile_bytes = TILE * self.hidden.shape[1] * self.hidden.element_size()

    def add(self, group: _Group) -> None:
        """Add gathered rows of G tiles, ``[G, P, TILE]`` logits."""
        weight, bias, columns = self._weight(group.tiles)
        logits = products(take_rows(self.hidden, group.rows), weight.transpose(1, 2))
        logits = logits if bias is None else logits.add_(bias)
        masses, maxima, spread = self._exponentials(
            logits,
            shift=self.shift[group.rows],
            labels=columns == self.positions[group.rows][..., None],
            columns=columns,
            out=left_out(bias, self.options),
            live=group.live,
        )
        rows = group.rows.flatten()
        self.mass.index_add_(0, rows, masses.flatten())
        self.maximum.scatter_reduce_(0, rows, maxima.flatten(), "amax")
        if self.expected is not None:
            self.expected.index_add_(0, rows, products(spread, weight).flatten(0, 1))

    def add_hot(self, tiles: list[int], lists: tuple[Tensor, ...]) -> None:
        """Add all rows of G tiles, ``[R, G * TILE]`` logits; dead pairs are masked."""
        weight, bias, columns = self._weight(self.positions.new_tensor(tiles))
        weight = weight.flatten(0, 1)
        live = torch.zeros(len(tiles), len(self.mass), dtype=torch.bool, device=weight.device)
        for mask, tile in zip(live, tiles, strict=True):
            mask[lists[tile]] = True
        logits = product(self.hidden, weight.T).view(len(self.mass), len(tiles), TILE)
        logits = logits if bias is None else logits.add_(bias[:, 0])
        masses, maxima, spread = self._exponentials(
            logits,
            shift=self.shift[:, None],
            labels=columns[:, 0] == self.positions[:, None, None],
            columns=columns[:, 0],
            out=None if bias is None else left_out(bias[:, 0], self.options),
            live=live.T,
        )
        self.mass += masses.sum(-1)
        torch.maximum(self.maximum, maxima.amax(-1), out=self.maximum)
        if self.expected is not None:
            self.expected += product(spread.flatten(1), weight)

    def _weight(self, tiles: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gather rows ``[G, TILE, D]``, bias and columns ``[G, 1, TILE]`` of G tiles."""
        columns = tiles[:, None, None] * TILE + torch.arange(TILE, device=tiles.device)
        # the last tile may be ragged: its missing columns repeat a row and are masked
        inside = columns.clamp(max=self.head.weight.shape[0] - 1)
        tokens = inside if self.order is None else self.order[inside]
        weight = weight_rows(self.head, tokens[:, 0], self.hidden.dtype)
        bias = None if self.head.bias is None else self.head.bias[tokens].to(weight.dtype)
        return weight, bias, columns

    def _exponentials(
        self,
        logits: Tensor,
        *,
        shift: Tensor,
        labels: Tensor,
        columns: Tensor,
        out: Tensor | None,
        live: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each pair's mass and maximum, and ``exp(z - shift) · slope``, without the label.

        It overwrites ``logits [A, B, TILE]``, which are ``H Wᵀ + b``. Bool ``labels``,
        ``columns`` and ``out`` broadcast to them, ``shift`` and ``live`` to ``[A, B]``.
        """
        logits = finish_logits(logits, self.options)
        slope = None if self.options.softcap is None else softcap_slope(logits, self.options)
        masked = labels | (columns >= self.head.weight.shape[0])
        if out is not None:
            masked |= out
        if live is not None:
            masked |= ~live[..., None]
        logits.masked_fill_(masked, float("-inf"))
        maxima = logits.amax(-1)
        exponentials = logits.sub_(shift[..., None]).exp_()
        masses = exponentials.sum(-1)
        return masses, maxima, exponentials if slope is None else exponentials.mul_(slope)
