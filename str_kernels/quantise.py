"""Eight bits a number: rows that an 8-bit screen multiplies, each scaled to its whole range."""

from __future__ import annotations

import torch
from torch import Tensor

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by the name of the screen
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SAMPLED = 1024  # rows of W, or a few more
_MOST = 9.0  # a column's logarithm: e⁹ from the mean is beyond what 8 bits can tell apart
LEAST = 1e-30  # the largest of a row; the reciprocal of its scale is still finite


def balance(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """What columns of W ``[V, D]`` are multiplied by, and those of H ``[R, D]`` divided: ``[D]``.

    ``√(rms of H's column / rms of W's)``, over a thousand rows of W: the product is the same, and a
    column that is large in one of them alone takes no bits from the others. On a real model that
    halves the error of a screened logit. SmoothQuant (arXiv 2211.10438) balances maxima. Only the
    columns' proportions matter: their geometric mean is 1, and one of zeros, or with NaN or inf, is
    as the mean.
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
    """Rows ``[R, D]`` in 8 bits, and the scales ``[R]`` fp32 that they are multiplied by.

    ``columns [D]``: what the columns are multiplied by first. A row with NaN or inf has such a
    scale, and so have its logits.
    """
    rows = rows.float() if columns is None else rows * columns
    scales = torch.maximum(rows.amax(-1), -rows.amin(-1))
    scales = scales.clamp_(min=LEAST).div_(TOP[dtype])
    rows = rows * scales.reciprocal()[:, None]  # twice as fast as a division
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scales
