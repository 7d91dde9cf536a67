"""What the kernels are given: prepares operands, allocates results, orders launches, reads nothing.

No call here waits for the device, except the refinement without atomics, which reads one number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.triton.combine import combine_kernel
from str_kernels.backends.triton.launch import ROWWISE, Launch
from str_kernels.backends.triton.quantise import quantise_kernel
from str_kernels.backends.triton.refine import refine_kernel
from str_kernels.backends.triton.route import plan_kernel, route_kernel, threshold_kernel
from str_kernels.backends.triton.screen import screen_kernel
from str_kernels.engine.contract import (
    Head,
    OpenRows,
    Refined,
    RowShares,
    TileMasses,
    Tiles,
    Wanted,
    Worklist,
)
from str_kernels.engine.logits import kept_dtype
from str_kernels.engine.tiles import positions_of
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import LEAST, TOP, balance

GROUP = 8  # blocks of rows that share a tile of W in L2


class Operands(NamedTuple):
    """A head as the kernels take it; everything contiguous, ``bias`` in tile order."""

    hidden: Tensor
    weight: Tensor
    order: Tensor | None
    bias: Tensor | None
    precision: str

    @property
    def rows(self) -> int:
        """R."""
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.hidden.shape[1]

    @property
    def tiles(self) -> int:
        """T."""
        return -(-self.vocab // TILE)


def operands(head: Head, order: Tensor | None) -> Operands:
    """Bring a head into the kernels' form; only a strided weight is copied."""
    bias = head.bias
    if bias is not None:
        bias = bias.contiguous() if order is None else bias[order]
    return Operands(
        head.hidden_states.contiguous(),
        head.weight.contiguous(),
        order,
        bias,
        "tf32" if _tf32_allowed() else "ieee",
    )


def _tf32_allowed() -> bool:
    """Whether the user lets torch's own fp32 products use tf32; AMD has fp32 matrix units."""
    if torch.version.hip:
        return False
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # since torch 2.9; the older name would mix with it
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


def common(given: Operands, options: LossOptions) -> dict[str, Any]:
    """Arguments that every kernel with logits takes."""
    return {
        "vocab": given.vocab,
        "logit_scale": float(options.logit_scale),
        "dim": given.dim,
        "softcap": None if options.softcap is None else float(options.softcap),
        "precision": given.precision,
    }


def tuning(launch: Launch) -> dict[str, int]:
    """Warps and stages, as a launch takes them."""
    return {"num_warps": launch.warps, "num_stages": launch.stages}


def screen(given: Operands, options: LossOptions, launch: Launch) -> TileMasses:
    """Log-masses from the operands' own dtype (W is cast to that of H)."""
    found = _empty_masses(given, options)
    _screen(given, (None, None), options, launch, found)
    return _by_rows(found)


def screen_quantised(
    given: Operands,
    tiles: Tiles,
    options: LossOptions,
    launch: Launch,
    dtype: torch.dtype,
    byte_budget: int,
) -> TileMasses:
    """Log-masses from 8-bit operands: the index's rows, or W's quantised some tiles at a time."""
    found = _empty_masses(given, options)
    if tiles.quantised is not None and tiles.quantised.dtype == dtype:
        hidden, scale = quantised(given.hidden, dtype)
        kept = given._replace(hidden=hidden, weight=tiles.quantised.contiguous(), order=None)
        _screen(kept, (scale, tiles.row_scales), options, launch, found)
        return _by_rows(found)
    columns = balance(given.hidden, given.weight)
    hidden, scale = quantised(given.hidden, dtype, columns=columns.reciprocal())
    step = max(1, byte_budget // (TILE * given.dim))
    for first in range(0, given.tiles, step):
        places = range(first * TILE, min((first + step) * TILE, given.vocab))
        weight, scales = quantised(given.weight, dtype, given.order, places, columns)
        bias = None if given.bias is None else given.bias[places.start : places.stop]
        part = Operands(hidden, weight, None, bias, given.precision)
        here = [None if x is None else x[first : first + step] for x in found]
        _screen(part, (scale, scales), options, launch, here)
    return _by_rows(found)


def quantised(
    rows: Tensor,
    dtype: torch.dtype,
    order: Tensor | None = None,
    places: range | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows at these places, all by default, times ``columns [D]``: in 8 bits, and their scales."""
    places = range(len(rows)) if places is None else places
    eight = torch.empty(len(places), rows.shape[1], dtype=dtype, device=rows.device)
    scales = torch.empty(len(places), dtype=torch.float32, device=rows.device)
    quantise_kernel[(-(-len(places) // ROWWISE.block_r),)](
        rows,
        order,
        columns,
        eight,
        scales,
        places.start,
        places.stop,
        rows.shape[1],
        TOP[dtype],
        LEAST,
        BLOCK_R=ROWWISE.block_r,
        BLOCK_D=ROWWISE.block_d,
        **tuning(ROWWISE),
    )
    return eight, scales


def _empty_masses(given: Operands, options: LossOptions) -> list[Tensor | None]:
    """Of log-masses and slopes, ``[T, R]`` both; no slopes without a softcap."""
    log_mass = given.hidden.new_empty(given.tiles, given.rows, dtype=torch.float32)
    return [log_mass, None if options.softcap is None else torch.empty_like(log_mass)]


def _by_rows(found: list[Tensor | None]) -> TileMasses:
    log_mass, slope = found
    return TileMasses(log_mass.T, None if slope is None else slope.T)


def _screen(
    given: Operands,
    scales: tuple[Tensor | None, Tensor | None],
    options: LossOptions,
    launch: Launch,
    found: list[Tensor | None],
) -> None:
    screen_kernel[(-(-given.rows // launch.block_r) * given.tiles,)](
        given.hidden,
        scales[0],
        given.weight,
        scales[1],
        given.order,
        given.bias,
        *found,
        given.rows,
        **common(given, options),
        BLOCK_R=launch.block_r,
        BLOCK_D=launch.block_d,
        GROUP=GROUP,
        **tuning(launch),
    )


def label_places(labels: Tensor, order_inverse: Tensor | None) -> Tensor:
    """``[R]`` int32, where each label stands in the order, -1 where there is none."""
    return positions_of(labels, order_inverse).int()


def route(masses: TileMasses, labels: Tensor, tiles: Tiles, log_eps: float) -> Worklist:
    """Live pairs; the masses are used up, their memory becomes ``dead``."""
    log_mass = masses.log_mass.T.contiguous()
    count, rows = log_mass.shape
    label = label_places(labels, tiles.inverse)
    shift, threshold = torch.empty(2, rows, dtype=torch.float32, device=log_mass.device)
    threshold_kernel[(-(-rows // 32),)](
        log_mass, label, shift, threshold, rows, count, log_eps, BLOCK_R=32, BLOCK_T=32
    )
    listed = torch.empty(count, rows, dtype=torch.int32, device=log_mass.device)
    counts = torch.zeros(count, dtype=torch.int32, device=log_mass.device)
    route_kernel[(count,)](log_mass, shift, threshold, label, listed, counts, rows, BLOCK=1024)
    return Worklist(listed, counts, shift, log_mass.T)


def plan_chunks(counts: Tensor, rows: int, block: int) -> Tensor:
    """Chunks of at most ``block`` live rows: ``[1 + C, 3]`` int32, as ``refine_kernel`` reads it.

    C is the bound; how many there are stands in the first row and stays on the device, and beyond
    them stands nothing.
    """
    most = len(counts) * -(-rows // block)
    plan = torch.empty(1 + most, 3, dtype=torch.int32, device=counts.device)
    plan_kernel[(len(counts),)](counts, plan, len(counts), rows, CHUNK=block, BLOCK=1024)
    return plan


def refine(
    given: Operands,
    labels: Tensor,
    tiles: Tiles,
    work: Worklist,
    options: LossOptions,
    wanted: Wanted,
    launch: Launch,
    programs: int,
) -> Refined:
    """Live pairs, added up with atomics."""
    plan = plan_chunks(work.counts, given.rows, launch.block_r)
    mass = torch.zeros_like(work.shift)
    maximum = torch.full_like(mass, float("-inf"))
    expected = mass.new_zeros(given.rows, given.dim) if wanted.hidden else None
    label = label_places(labels, tiles.inverse)
    _refine(
        given, work, plan, label, (mass, maximum, expected), options, launch, programs, atomic=True
    )
    return Refined(mass, expected, maximum)


def refine_in_order(
    given: Operands,
    labels: Tensor,
    tiles: Tiles,
    work: Worklist,
    options: LossOptions,
    wanted: Wanted,
    launch: Launch,
    programs: int,
    byte_budget: int,
) -> Refined:
    """Live pairs without atomics: every chunk fills its own slots, torch adds them in order.

    Bitwise the same each time where ``index_add_`` is (``torch.use_deterministic_algorithms``).
    """
    plan = plan_chunks(work.counts, given.rows, launch.block_r)
    mass = torch.zeros_like(work.shift)
    maximum = torch.full_like(mass, float("-inf"))
    expected = mass.new_zeros(given.rows, given.dim) if wanted.hidden else None
    label = label_places(labels, tiles.inverse)
    chunks = int(plan[0, 0])  # the one number read back: how many slots there must be
    step = max(1, byte_budget // (4 * given.dim * launch.block_r))
    for part in plan[1 : 1 + chunks].split(step):
        head = torch.tensor([[len(part), 0, 0]], dtype=torch.int32, device=part.device)
        place = part[:, 1:2] + torch.arange(launch.block_r, device=part.device)
        rows = work.rows.flatten()[torch.where(place < part[:, 2:], place, part[:, 1:2])].flatten()
        slots = (
            mass.new_zeros(len(rows)),
            mass.new_full((len(rows),), float("-inf")),
            None if expected is None else mass.new_zeros(len(rows), given.dim),
        )
        part = torch.cat([head, part])
        _refine(given, work, part, label, slots, options, launch, programs, atomic=False)
        rows = rows.long()
        mass.index_add_(0, rows, slots[0])
        maximum.scatter_reduce_(0, rows, slots[1], "amax")
        if expected is not None:
            expected.index_add_(0, rows, slots[2])
    return Refined(mass, expected, maximum)


def combine(head: Head, labels: Tensor, opened: OpenRows, shares: RowShares) -> Tensor:
    """A row gradient ``[R, D]`` in ``kept_dtype``."""
    rows, dim = opened.live.shape
    weight, also = head.weight.contiguous(), shares.also
    out = opened.live.new_empty(rows, dim, dtype=kept_dtype(head.hidden_states.dtype))
    combine_kernel[(-(-rows // ROWWISE.block_r) * -(-dim // ROWWISE.block_d),)](
        opened.live,
        opened.dead,
        also,
        opened.scale * shares.opened,
        shares.label,
        shares.silent,
        head.hidden_states,
        weight,
        labels,
        out,
        rows,
        dim if also is not None and also.dim() == 2 else 0,
        dim,
        BLOCK_R=ROWWISE.block_r,
        BLOCK_D=ROWWISE.block_d,
        **tuning(ROWWISE),
    )
    return out


def _refine(
    given: Operands,
    work: Worklist,
    plan: Tensor,
    label: Tensor,
    results: tuple[Tensor, Tensor, Tensor | None],
    options: LossOptions,
    launch: Launch,
    programs: int,
    *,
    atomic: bool,
) -> None:
    programs = min(programs, len(plan) - 1)  # there are no more chunks than that
    refine_kernel[(programs,)](
        given.hidden,
        given.weight,
        given.order,
        given.bias,
        work.rows,
        plan,
        work.shift,
        label,
        *results,
        **common(given, options),
        BLOCK_R=launch.block_r,
        BLOCK_D=launch.block_d,
        BLOCK_E=launch.block_e,
        ATOMIC=atomic,
        **tuning(launch),
    )
