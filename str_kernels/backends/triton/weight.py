"""The gradient of a trainable weight and bias, some tiles at a time, without atomics.

Stage: ``Saved``, ``Coefficients`` → ``Gradients``. For each group of tiles its live rows are listed
(routed), ``dz`` of these rows is made again into a buffer, and one program owns each block of the
weight's gradient: it sums ``dzᵀ H`` in fp32, adds what the dead pairs and the constraint give, and
rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.triton import host
from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.weight_kernels import (
    live_kernel,
    logit_gradient_kernel,
    weight_kernel,
)
from str_kernels.engine.contract import Coefficients, Gradients, Head, SafetyTerm, Saved
from str_kernels.engine.dead import dead_share, silent_rows
from str_kernels.options import TILE, LossOptions


class _Lists(NamedTuple):
    """Live rows of C tiles: ``rows [C, R]``, ``counts [C]`` int32, or None for every row."""

    rows: Tensor | None
    counts: Tensor | None


def weight_gradients(
    head: Head,
    labels: Tensor,
    saved: Saved,
    coefficients: Coefficients,
    safety: SafetyTerm | None,
    options: LossOptions,
    needs: tuple[bool, bool],
    launches: tuple[Launch, Launch],
    byte_budget: int,
) -> Gradients:
    """Gradients of R rows with labels ``[R]``, -1 where there is none; see ``Backend``."""
    routed = saved.masses is not None
    order, inverse = saved.tiles[:2] if routed else (None, None)
    given = host.operands(head, order)
    spread = dead_share(head, saved, coefficients, options) if routed else (None, None)
    sums = _Sums(given, host.label_places(labels, inverse), saved, coefficients, options, launches)
    weight = torch.empty_like(given.weight) if needs[0] else None
    bias = torch.zeros(given.vocab, device=given.hidden.device) if needs[1] else None
    slots = _safety_slots(safety, inverse, given.vocab)
    one = max(1, given.rows) * (TILE * given.hidden.element_size() + 4)
    step = max(1, byte_budget // one)
    for first in range(0, given.tiles, step):
        tiles = min(step, given.tiles - first)
        lists = sums.list_live(first, tiles)
        dz = sums.logit_gradients(lists, first, tiles)
        sums.multiply(lists, dz, (spread[0], slots, safety), (weight, bias), first, tiles)
    if bias is not None:
        bias = _finish_bias(bias, spread[1], order, safety).to(head.bias.dtype)
    return Gradients(weight, bias)


class _Sums:
    """What every group of tiles is made from."""

    def __init__(
        self,
        given: host.Operands,
        label: Tensor,
        saved: Saved,
        coefficients: Coefficients,
        options: LossOptions,
        launches: tuple[Launch, Launch],
    ) -> None:
        self.given, self.label, self.masses = given, label, saved.masses
        self.options, self.launches = options, launches
        self.coefficients, self.scale = _packed(coefficients, saved)

    def list_live(self, first: int, tiles: int) -> _Lists:
        """The live rows of ``tiles`` tiles from tile ``first`` on."""
        if self.masses is None:
            return _Lists(None, None)
        rows = self.label.new_empty(tiles, self.given.rows)
        counts = self.label.new_empty(tiles)
        strides = self.masses.stride()
        live_kernel[(tiles,)](
            self.masses, rows, counts, self.given.rows, first, *strides, BLOCK=1024
        )
        return _Lists(rows, counts)

    def logit_gradients(self, lists: _Lists, first: int, tiles: int) -> Tensor:
        """``dz [C, R, TILE]``, the entries of listed rows."""
        given, launch = self.given, self.launches[0]
        dz = given.hidden.new_empty(tiles, given.rows, TILE)
        logit_gradient_kernel[(-(-given.rows // launch.block_r) * tiles,)](
            given.hidden,
            given.weight,
            given.order,
            given.bias,
            *lists,
            self.coefficients,
            self.label,
            dz,
            given.rows,
            first_tile=first,
            **host.common(given, self.options),
            BLOCK_R=launch.block_r,
            BLOCK_D=launch.block_d,
            GROUP=host.GROUP,
            **host.tuning(launch),
        )
        return dz

    def multiply(
        self,
        lists: _Lists,
        dz: Tensor,
        extra: tuple[Tensor | None, Tensor | None, SafetyTerm | None],
        results: tuple[Tensor | None, Tensor | None],
        first: int,
        tiles: int,
    ) -> None:
        """Write the group's rows of both gradients."""
        given, launch = self.given, self.launches[1]
        spread, slots, safety = extra
        wide = 1 if results[0] is None else -(-given.dim // launch.block_e)
        weight_kernel[(tiles * wide,)](
            given.hidden,
            dz,
            *lists,
            given.order,
            self.scale,
            spread,
            slots,
            None if safety is None else safety.weight,
            *results,
            given.rows,
            given.vocab,
            first,
            given.dim,
            given.precision,
            BLOCK_R=launch.block_r,
            BLOCK_E=launch.block_e,
            **host.tuning(launch),
        )


def _packed(coefficients: Coefficients, saved: Saved) -> tuple[Tensor, Tensor]:
    """``[4, R]`` lse, α, the label's dz, σ, divided by the scale ``[1]`` that is also returned.

    Scaled to the largest row, since fp16 ends at 6e-8 and a mean over a long batch begins there.
    """
    alpha, gamma, sigma = coefficients
    at_label = alpha - gamma - alpha * saved.open_mass
    packed = torch.stack(
        [saved.lse, alpha, at_label, torch.zeros_like(alpha) if sigma is None else sigma]
    )
    packed.masked_fill_(silent_rows(coefficients), 0.0)
    # others of a row have at most α · open mass between them; NaN rows shall not decide
    largest = torch.maximum(packed[2].abs(), (packed[1] * saved.open_mass).abs())
    largest = torch.nan_to_num(largest, nan=0.0, posinf=0.0)
    scale = torch.cat([largest, largest.new_zeros(1)]).amax(0, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    packed[1:] /= scale
    return packed, scale


def _safety_slots(safety: SafetyTerm | None, inverse: Tensor | None, vocab: int) -> Tensor | None:
    """``[V]`` int32: which safety token stands at a place of the order, -1 for none."""
    if safety is None:
        return None
    slots = torch.full((vocab,), -1, dtype=torch.int32, device=safety.ids.device)
    places = safety.ids if inverse is None else inverse[safety.ids]
    slots[places] = torch.arange(len(places), dtype=torch.int32, device=slots.device)
    return slots


def _finish_bias(
    bias: Tensor, spread: Tensor | None, order: Tensor | None, safety: SafetyTerm | None
) -> Tensor:
    """Add the dead pairs' and the constraint's part; from tile order to token order, ``[V]``."""
    if spread is not None:
        bias = bias + spread.repeat_interleave(TILE)[: len(bias)]
    if order is not None:
        bias = torch.empty_like(bias).index_copy_(0, order, bias)
    if safety is not None:
        bias.index_add_(0, safety.ids, safety.bias)
    return bias
