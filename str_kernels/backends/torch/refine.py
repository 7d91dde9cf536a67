"""Refine: the live pairs from the original operands, in fp32.

Stage: ``Worklist`` → ``Refined``. How many rows a tile keeps is very uneven, so tiles are taken in
three ways: *hot* ones, live for most rows, several at a time with every row and the dead pairs
masked, so that nothing is gathered; *cold* ones in batches, padded to the same few rows; the others
one by one.
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
from str_kernels.engine.tiles import positions_of
from str_kernels.options import TILE

_HOT_SHARE = 0.5  # of the rows: gathering the others would cost what it saves
_HOT_TILES = 4  # at a time
_COLD_ROWS = 32  # at most; one small product is mostly overhead


class _Group(NamedTuple):
    """G tiles and the P rows taken of each: ``tiles [G]``, ``rows [G, P]``, ``live [G, P]``."""

    tiles: Tensor
    rows: Tensor
    live: Tensor | None  # None: all of them


def refine_pairs(block: Block, work: Worklist, wanted: Wanted, cold_bytes: int) -> Refined:
    """``Refined`` of R rows; the weight rows of a batch of cold tiles take ``cold_bytes``."""
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
    """Tiles of similar counts together, ``size`` at a time, so that little is padded."""
    for start in range(0, len(cold), size):
        batch = cold[start : start + size]
        rows = torch.nn.utils.rnn.pad_sequence([lists[tile] for tile in batch], batch_first=True)
        live = rows.new_tensor([counts[tile] for tile in batch])[:, None]
        live = torch.arange(rows.shape[1], device=rows.device) < live
        yield _Group(rows.new_tensor(batch), rows, live)


class _Sums:
    """What the live pairs add up to, row by row."""

    def __init__(self, block: Block, work: Worklist, wanted: Wanted) -> None:
        head, labels, tiles, options = block
        self.head, self.order, self.options, self.shift = head, tiles.order, options, work.shift
        self.hidden = head.hidden_states.to(accumulator(head.hidden_states.dtype))
        self.positions = positions_of(labels, tiles.inverse)
        self.mass = torch.zeros_like(work.shift)
        self.maximum = torch.full_like(self.mass, float("-inf"))
        self.expected = torch.zeros_like(self.hidden) if wanted.hidden else None
        self.tile_bytes = TILE * self.hidden.shape[1] * self.hidden.element_size()

    def add(self, group: _Group) -> None:
        """Gathered rows of G tiles, ``[G, P, TILE]`` logits."""
        weight, bias, columns = self._weight(group.tiles)
        logits = products(take_rows(self.hidden, group.rows), weight.transpose(1, 2))
        masses, maxima, spread = self._exponentials(
            logits, bias, columns, self.positions[group.rows], self.shift[group.rows], group.live
        )
        rows = group.rows.flatten()
        self.mass.index_add_(0, rows, masses.flatten())
        self.maximum.scatter_reduce_(0, rows, maxima.flatten(), "amax")
        if self.expected is not None:
            self.expected.index_add_(0, rows, products(spread, weight).flatten(0, 1))

    def add_hot(self, tiles: list[int], lists: tuple[Tensor, ...]) -> None:
        """All rows of G tiles, ``[R, G * TILE]`` logits; dead pairs masked."""
        weight, bias, columns = self._weight(self.positions.new_tensor(tiles))
        weight = weight.flatten(0, 1)
        live = torch.zeros(len(tiles), len(self.mass), dtype=torch.bool, device=weight.device)
        for mask, tile in zip(live, tiles, strict=True):
            mask[lists[tile]] = True
        logits = product(self.hidden, weight.T).view(len(self.mass), len(tiles), TILE)
        masses, maxima, spread = self._exponentials(
            logits,
            None if bias is None else bias[:, 0],
            columns[:, 0],
            self.positions[:, None],
            self.shift[:, None],
            live.T,
        )
        self.mass += masses.sum(-1)
        torch.maximum(self.maximum, maxima.amax(-1), out=self.maximum)
        if self.expected is not None:
            self.expected += product(spread.flatten(1), weight)

    def _weight(self, tiles: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows ``[G, TILE, D]`` and bias ``[G, 1, TILE]`` of G tiles, and their columns' places."""
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
        bias: Tensor | None,
        columns: Tensor,
        positions: Tensor,
        shift: Tensor,
        live: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mass and maximum of each pair, and ``exp(z - shift) · slope``, the label left out.

        ``logits [A, B, TILE]`` are used up; the others broadcast to them or to ``[A, B]``.
        """
        if bias is not None:
            logits += bias
        logits = finish_logits(logits, self.options)
        slope = None if self.options.softcap is None else softcap_slope(logits, self.options)
        out = (columns == positions[..., None]) | (columns >= self.head.weight.shape[0])
        if live is not None:
            out |= ~live[..., None]
        logits.masked_fill_(out, float("-inf"))
        maxima = logits.amax(-1)
        exponentials = logits.sub_(shift[..., None]).exp_()
        masses = exponentials.sum(-1)
        return masses, maxima, exponentials if slope is None else exponentials.mul_(slope)
