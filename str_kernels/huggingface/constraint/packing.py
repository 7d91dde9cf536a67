"""Where each sequence starts, in rows that contain several one after another.

Stage: the arguments of a forward → ``[B, T]`` bool, True on the first token of every sequence but
the row's first. Only ``cu_seq_lens_q`` on a CPU is read back, and nothing from another device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The forward's arguments that tell sequences apart, the most explicit first.
PACKING = ("cu_seq_lens_q", "seq_idx", "position_ids")


def sequence_starts(
    shape: torch.Size, arguments: Mapping[str, Any], device: torch.device
) -> Tensor | None:
    """``[B, T]`` bool on ``device``; None if no argument says so, and every row is one sequence.

    The first of ``PACKING`` that is there counts: ``cu_seq_lens_q [n + 1]``, where each sequence
    starts in the flattened batch, and the end, after which padding may follow; ``seq_idx [B, T]``,
    whose every change starts one; ``position_ids [B, T]`` or ``[1, T]``, where one starts whose id
    is not the next number, or ``[axes, B, T]``, where all ids are 0.

    Raises:
        ValueError: an argument, by name, that is not of integers or does not fit ``[B, T]``.
    """
    for name, reader in zip(PACKING, (_of_lengths, _of_numbers, _of_positions), strict=True):
        given = arguments.get(name)
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
            raise ValueError(f"{name}={described(given)}: must be a tensor of integers.")
        starts = reader(given.to(device), shape).expand(shape).clone()
        starts[:, 0] = False
        return starts
    return None


def described(given: Any) -> str:
    """Shape and dtype of a tensor, the type of anything else."""
    if isinstance(given, Tensor):
        return f"{list(given.shape)} {given.dtype}"
    return type(given).__name__


def _of_lengths(ends: Tensor, shape: torch.Size) -> Tensor:
    total = shape.numel()
    if ends.dim() != 1 or len(ends) < 2:
        raise ValueError(
            f"cu_seq_lens_q={described(ends)}: must be [sequences + 1], from 0 to the number of "
            f"tokens, {total}."
        )
    if ends.device.type == "cpu":  # elsewhere a look would wait for the device
        bounds = ends.tolist()
        if bounds[0] != 0 or bounds[-1] > total or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seq_lens_q={bounds}: must rise from 0 to the number of tokens, {total}, at "
                "most; it belongs to another batch?"
            )
    starts = torch.zeros(total + 1, dtype=torch.bool, device=ends.device)
    starts[ends.long().clamp(0, total)] = True
    return starts[:total].reshape(shape)


def _of_numbers(numbers: Tensor, shape: torch.Size) -> Tensor:
    _require_rows("seq_idx", numbers, shape)
    return _differs(numbers[:, 1:], numbers[:, :-1])


def _of_positions(ids: Tensor, shape: torch.Size) -> Tensor:
    if ids.dim() == 3:  # several axes, as images need them: they count from 0 together
        _require_rows("position_ids", ids[0], shape)
        return (ids == 0).all(0)
    _require_rows("position_ids", ids, shape)
    return _differs(ids[:, 1:], ids[:, :-1] + 1)


def _differs(later: Tensor, expected: Tensor) -> Tensor:
    return torch.nn.functional.pad(later != expected, (1, 0), value=False)


def _require_rows(name: str, given: Tensor, shape: torch.Size) -> None:
    if given.dim() != 2 or given.shape[0] not in (1, shape[0]) or given.shape[1] != shape[1]:
        raise ValueError(
            f"{name}={described(given)}: must be {list(shape)}, a number for each token that the "
            "head sees; positions='labels' needs none."
        )
