"""Compute what the Triton kernels issue by formula: operations and bytes of every stage.

Stage: shape, live rows of each tile, launch sizes → ``Work`` of each stage. A product of blocks
costs what its blocks are wide, rows that are only padding included; ``tests/triton/interpreted/
test_counted.py`` counts the same in Triton's interpreter, operations exactly and bytes but for a
few scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from str_kernels.options import TILE

if TYPE_CHECKING:
    from str_kernels.backends.triton.launch import Launch

GROUP = 8  # blocks of rows that share a tile of W, as ``backends.triton.operands`` launches them
_ANCHORS = 16  # columns of the product with the anchors, half of them padding
_IN_CACHE = 24 << 20  # bytes of a slice of the sums, as ``backends.triton.refine`` has it
Unit = Literal["operands", "8 bits", "fp32"]


class Shape(NamedTuple):
    """R rows, V, D, and the bytes of an operand's number."""

    rows: int
    vocab: int
    dim: int
    size: int

    @property
    def tiles(self) -> int:
        """T."""
        return -(-self.vocab // TILE)

    @property
    def gemm(self) -> int:
        """Operations of the bare product ``H Wᵀ``."""
        return 2 * self.rows * self.vocab * self.dim

    @property
    def head(self) -> int:
        """Bytes of W."""
        return self.vocab * self.dim * self.size

    @property
    def states(self) -> int:
        """Bytes of H."""
        return self.rows * self.dim * self.size

    @property
    def pairs(self) -> int:
        """(row, tile) pairs."""
        return self.rows * self.tiles


class Work(NamedTuple):
    """One stage. ``operations`` of ``unit``; bytes ``loaded``, ``stored``, ``added`` as issued.

    ``memory``: the least bytes that come from and go to memory, with all reuse that the order of
    the programs is made for; what is issued beyond it is served by L2. Atomics stay in L2 here.
    """

    stage: str
    unit: Unit
    operations: int
    loaded: int
    stored: int
    added: int
    memory: int


def total(works: Iterable[Work]) -> list[Work]:
    """Add up stages of the same name and unit, in their first order."""
    found: dict[tuple[str, str], Work] = {}
    for work in works:
        key = work[:2]
        old = found.get(key)
        numbers = work[2:] if old is None else map(sum, zip(old[2:], work[2:], strict=True))
        found[key] = Work(*key, *numbers)
    return list(found.values())


def gemms(works: Iterable[Work], shape: Shape) -> float:
    """Return the work in bare products; an operation on 8 bits counts half."""
    parts = (work.operations * (0.5 if work.unit == "8 bits" else 1.0) for work in works)
    return sum(parts) / shape.gemm


def routed(
    shape: Shape,
    counts: Tensor,
    launches: dict[str, Launch],
    *,
    eight_bits: bool = False,
    kept: bool = False,
    hot: int = 0,
) -> list[Work]:
    """List a block's forward and backward with a frozen head; ``counts [T]`` are live rows.

    ``eight_bits``: the screen has 8 bits; ``kept``: W's quantised rows are there, by the index or
    an earlier block of the same call; ``hot``: so many tiles, the first ones, take all rows.
    """
    counts = counts[hot:]
    return [
        _columns(shape, launches["columns"], _ANCHORS),
        *([_quantise(shape, kept)] if eight_bits else []),
        _screen(shape, launches["screen"], eight_bits),
        _route(shape, counts),
        *([_hot(shape, hot)] if hot else []),
        _refine(shape, counts, launches["refine"]),
        _dead("dead tiles", shape),
        _finish(shape, 4 * shape.pairs),
        _combine(shape, parts=2),
        _reduce(shape),
        _gradient(shape, launches["backward"]),
    ]


def routed_weight(shape: Shape, counts: Tensor, launches: dict[str, Launch]) -> list[Work]:
    """List what a trainable head adds, for all rows at once: ``counts [T]``."""
    live, wide = int(counts.sum()), -(-shape.dim // launches["weight"].block_e)
    pairs = 4 * shape.pairs
    listing = Work("weight lists", "fp32", 0, pairs, 4 * live + 4 * shape.tiles, 0, pairs)
    listed = 4 * live * (1 + wide) + 8 * TILE * shape.tiles * wide + 4 * shape.tiles * shape.dim
    return [
        listing,
        *_weight(shape, counts, launches, listed, ordered=True),
        _dead("weight, dead tiles", shape),
    ]


def exact(shape: Shape, launches: dict[str, Launch], byte_budget: int) -> list[Work]:
    """List forward and backward with a frozen head and every logit computed.

    The first kernel reads each tile's labels twice: first to see whether any row is there.
    """
    rows, _, dim, size = shape
    first, second = launches["softmax"], launches["expected"]
    logits, wide = shape.pairs * TILE * size, -(-dim // second.block_e)
    steps = -(-shape.tiles // max(1, byte_budget // (TILE * size * rows)))
    blocks = -(-rows // first.block_r)
    softmax = Work(
        "softmax",
        "operands",
        _product(blocks * shape.tiles, first.block_r, dim, first.block_d),
        blocks * shape.tiles * (first.block_r + TILE) * dim * size + 8 * shape.pairs,
        logits + 16 * shape.pairs,
        0,
        _from_memory(shape, first) + logits + 16 * shape.pairs,
    )
    blocks, sums = -(-rows // second.block_r), 4 * rows * dim * steps
    expected = Work(
        "expected",
        "operands",
        _product(blocks * shape.tiles, second.block_r, dim, second.block_e),
        (logits + 4 * shape.pairs) * wide
        + blocks * shape.tiles * TILE * dim * size
        + sums
        + 4 * rows * wide * steps,
        sums,
        0,
        logits + shape.head + 2 * sums,
    )
    columns = _columns(shape, launches["columns"], 0)
    gradient = _gradient(shape, launches["backward"])
    rest = [_finish(shape, 0), _combine(shape, parts=1), _reduce(shape), gradient]
    return [columns, softmax, expected, *rest]


def exact_weight(shape: Shape, launches: dict[str, Launch]) -> list[Work]:
    """List what a trainable head adds to it: the logits again, and ``dzᵀ H``."""
    every = torch.full((shape.tiles,), shape.rows)
    return _weight(shape, every, launches, 0, ordered=False)


def _columns(shape: Shape, launch: Launch, tokens: int) -> Work:
    """Count the labels' rows, which are summed beside the product, and those of the anchors."""
    blocks, read = -(-shape.rows // launch.block_r), 2 * shape.states + 9 * shape.rows
    wide = -(-shape.dim // launch.block_d) * launch.block_d
    return Work(
        "columns",
        "operands",
        2 * blocks * launch.block_r * tokens * wide,
        read + blocks * tokens * shape.dim * shape.size,
        (8 if tokens else 4) * shape.rows,
        0,
        read,
    )


def _quantise(shape: Shape, kept: bool) -> Work:
    """Count that every row is read twice, the second time from a cache."""
    rows = shape.rows + (0 if kept else shape.vocab)
    read, stored = rows * shape.dim * shape.size, rows * (shape.dim + 4)
    # both passes' columns, once for four rows, and the order
    others = 8 * shape.dim * -(-shape.rows // 4)
    if not kept:
        others += 8 * shape.vocab + 8 * shape.dim * -(-shape.vocab // 4)
    return Work("quantise", "fp32", 0, 2 * read + others, stored, 0, read + others + stored)


def _combine(shape: Shape, parts: int) -> Work:
    """Count expected rows, the label's, and with two parts the dead pairs', in one pass."""
    loaded = (4 + shape.size * parts) * shape.rows * shape.dim + 17 * shape.rows
    return Work("combine", "fp32", 0, loaded, shape.states, 0, loaded + shape.states)


def _finish(shape: Shape, masses: int) -> Work:
    """Count the sums and the results of rows, and the bytes of the dead masses."""
    loaded, stored = 24 * shape.rows + masses, 49 * shape.rows
    return Work("finish", "fp32", 0, loaded, stored, 0, loaded + stored)


def _reduce(shape: Shape) -> Work:
    """Count each row's term, label and whether it is right, which one program sums up."""
    loaded = 13 * shape.rows
    return Work("reduce", "fp32", 0, loaded, 32, 0, loaded + 32)


def _gradient(shape: Shape, launch: Launch) -> Work:
    """Count the row gradients, which are read once, and each row's upstream gradient."""
    loaded = shape.states + 4 * shape.rows * -(-shape.dim // launch.block_e)
    return Work("gradient", "fp32", 0, loaded, shape.states, 0, 2 * shape.states)


def _screen(shape: Shape, launch: Launch, eight_bits: bool) -> Work:
    if eight_bits:
        shape = shape._replace(size=1)
    blocks = -(-shape.rows // launch.block_r)
    programs = blocks * shape.tiles
    loaded = programs * (launch.block_r + TILE) * shape.dim * shape.size
    loaded += 4 * (shape.pairs + blocks * shape.vocab) if eight_bits else 8 * TILE * programs
    loaded += 4 * shape.pairs  # anchors
    return Work(
        "screen",
        "8 bits" if eight_bits else "operands",
        _product(programs, launch.block_r, shape.dim, launch.block_d),
        loaded,
        4 * shape.pairs,
        0,
        _from_memory(shape, launch) + 4 * shape.pairs,
    )


def _from_memory(shape: Shape, launch: Launch) -> int:
    """Return the bytes of W, once for each group of blocks of rows, and of H, once."""
    groups = -(-shape.rows // (GROUP * launch.block_r))
    return groups * shape.head + shape.states


def _route(shape: Shape, counts: Tensor) -> Work:
    """Count masses, read twice and written once, lists, anchors and other numbers of rows."""
    pairs, listed = 4 * shape.pairs, 4 * int(counts.sum())
    loaded = 6 * pairs + 8 * shape.rows + 4 * shape.tiles * (shape.tiles + 1)
    stored = pairs + listed + 8 * shape.rows + 4 * shape.tiles
    return Work("route", "fp32", 0, loaded, stored, 0, 3 * pairs + listed)


def _refine(shape: Shape, counts: Tensor, launch: Launch) -> Work:
    """Count a kernel of logits, whose exponentials are kept, and one that adds slices of D."""
    live, chunks, dim = int(counts.sum()), _chunks(counts, launch.block_r), shape.dim
    forward = _product(chunks, launch.block_r, dim, launch.block_d)
    columns = min(64, launch.block_e)
    back = _product(chunks, launch.block_r, dim, columns)
    width = max(1, _IN_CACHE // (4 * shape.rows) // columns) * columns
    slices, exponentials = -(-dim // width), chunks * launch.block_r * (TILE * shape.size + 4)
    loaded = chunks * (launch.block_r + 2 * TILE) * dim * shape.size
    loaded += (1 + slices) * chunks * (8 * TILE + 12) + (12 + 4 * slices) * live
    loaded += slices * exponentials
    touched = int((counts > 0).sum()) * TILE * dim * shape.size
    memory = touched + shape.states + 8 * shape.rows * dim + 2 * exponentials
    added = live * (4 * dim + 8)
    stored = 12 * chunks + 4 + exponentials
    return Work("refine", "operands", forward + back, loaded, stored, added, memory)


def _hot(shape: Shape, tiles: int) -> Work:
    """Count torch's two products with the gathered rows of W, and the kernel between them."""
    words, sums = tiles * TILE, 4 * shape.rows * shape.dim
    rows, pairs = words * shape.dim * shape.size, shape.rows * words
    loaded = 3 * rows + shape.states + (2 * 4 + shape.size) * pairs + sums
    stored = rows + (4 + shape.size) * pairs + 2 * sums
    memory = 2 * rows + shape.states + sums
    return Work("hot tiles", "operands", 4 * pairs * shape.dim, loaded, stored, 0, memory)


def padded(counts: Tensor, launch: Launch) -> int:
    """Count the pairs of chunks of live rows ``counts [T]``, padding included."""
    return _chunks(counts, launch.block_r) * launch.block_r


def _dead(stage: str, shape: Shape) -> Work:
    """Count ``[R, T] @ [T, D]``, torch's product, in bf16 if the operands have 16 bits."""
    sums = shape.states
    loaded = 4 * shape.pairs + 4 * shape.tiles * shape.dim
    operations = 2 * shape.pairs * shape.dim
    unit = "operands" if shape.size == 2 else "fp32"
    return Work(stage, unit, operations, loaded, sums, 0, loaded + sums)


def _weight(
    shape: Shape, counts: Tensor, launches: dict[str, Launch], listed: int, *, ordered: bool
) -> list[Work]:
    first, second = launches["gradient"], launches["weight"]
    live, dim, size = int(counts.sum()), shape.dim, shape.size
    chunks, wide = _chunks(counts, first.block_r), -(-dim // second.block_e)
    touched = int((counts > 0).sum()) * TILE * dim * size
    dz = live * TILE * size
    again = Work(
        "logits again",
        "operands",
        _product(chunks, first.block_r, dim, first.block_d),
        chunks * (first.block_r + TILE) * dim * size
        + chunks * (20 * first.block_r + 8 * TILE * ordered),
        dz,
        0,
        touched + shape.states + dz,
    )
    product = Work(
        "weight",
        "operands",
        _product(_chunks(counts, second.block_r), second.block_r, dim, second.block_e),
        dz * wide + live * dim * size + listed,
        shape.head,
        0,
        dz + shape.states + shape.head,
    )
    return [again, product]


def _chunks(counts: Tensor, block: int) -> int:
    """Count blocks of the tiles' live rows; each tile's last one is padded."""
    return int((-(-counts.long() // block)).sum())


def _product(blocks: int, rows: int, dim: int, step: int) -> int:
    """Return the operations of ``blocks`` products of ``rows`` × a tile × D in whole steps."""
    return 2 * blocks * rows * TILE * -(-dim // step) * step
