"""Eight bits a number: rows that an 8-bit screen multiplies, each scaled to its whole range."""

from __future__ import annotations

import torch
from torch import Tensor

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by the name of the screen
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 1e-30  # the largest of a row; the reciprocal of its scale is still finite


def quantise_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``[R, D]`` in 8 bits, and the scales ``[R]`` fp32 that they are multiplied by.

    A row with NaN or inf has such a scale, and so have its logits.
    """
    rows = rows.float()
    scales = torch.maximum(rows.amax(-1), -rows.amin(-1))
    scales = scales.clamp_(min=LEAST).div_(TOP[dtype])
    rows = rows * scales.reciprocal()[:, None]  # twice as fast as a division
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scales
