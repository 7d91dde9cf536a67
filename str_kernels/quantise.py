"""Quantise rows to 8 bits, each scaled to the whole range of its dtype, for an 8-bit screen."""

from __future__ import annotations

import torch
from torch import Tensor

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by the name of the screen
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SAMPLED = 1024  # rows of W, or a few more
_MOST = 9.0  # factors are clamped to e^±9, beyond what 8 bits can represent in one row
ALIGNED = 16  # bytes at whose multiples rows in 8 bits begin, as a GPU's widest loads need
LEAST = 1e-30  # a row's maximum is clamped to this, so that its scale has a finite reciprocal


def balance(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Return factors ``[D]``: multiply the columns of W ``[V, D]`` by them, divide those of H.

    They leave the product ``H Wᵀ`` unchanged. ``hidden_states [n, D]`` are typical ones. A column's
    factor is ``√(rms of H's / rms of W's)``, over a thousand rows of W, so that a column that is
    large in only one of the two does not take bits from the others. On a real model this halves the
    error of a screened logit; states of other text serve nearly as well, and factors from W alone
    make the error larger. (SmoothQuant, arXiv 2211.10438, balances maxima.) The factors are
    divided by their geometric mean, since only their proportions matter. A column that is all zero,
    or holds NaN or inf, gets the factor 1.
    """
    some = weight.detach()[:: max(1, len(weight) // _SAMPLED)]
    of_hidden, of_weight = (rows.float().square().mean(0) for rows in (hidden_states, some))
    logs = of_hidden.div_(of_weight).log_().mul_(0.25)
    known = logs.isfinite()
    logs = torch.where(known, logs, 0.0)
    mean = logs.sum() / known.sum().clamp(min=1)
    return torch.where(known, (logs - mean).clamp_(-_MOST, _MOST), 0.0).exp_()


def quantise_rows(
    rows: Tensor, dtype: torch.dtype, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows ``[R, D]`` in 8 bits and the scales ``[R]`` fp32 that restore them.

    ``columns [D]`` are factors that the columns are multiplied by first. A row with NaN or inf gets
    a scale of NaN or inf, which its logits then show.
    """
    rows = rows.float() if columns is None else rows * columns
    scales = torch.maximum(rows.amax(-1), -rows.amin(-1))
    scales = scales.clamp_(min=LEAST).div_(TOP[dtype])
    rows = rows * scales.reciprocal()[:, None]  # twice as fast as a division
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scales
