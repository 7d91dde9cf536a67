"""Compares a trial run of a model with one of the patched model: loss, gradients and logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from str_kernels.accuracy import relative_error

_ROUNDINGS = 8  # a logit is rounded so often at most: product, bias, scale, softcap, casts
_MASKED = 1e6  # a logit as large as this is a mask, however much larger


@dataclass(frozen=True)
class Verification:
    """The result of a trial.

    Attributes:
        skipped: why there was none; None: it was made, and nothing differed.
        fused: whether the loss was computed without the logits.
        errors: the size of each difference, by what was compared: absolute for the loss, relative
            to their norm for gradients and logits.
    """

    skipped: str | None = None
    fused: bool = False
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """The results of one forward that are compared."""

    loss: Tensor
    logits: Tensor | None
    gradients: dict[str, Tensor]
    step: float  # relative rounding of the operands that the head multiplied


def compare(dense: Run, patched: Run, words: int) -> tuple[dict[str, float], list[str]]:
    """The size of every difference, and a sentence for each that is more than rounding."""
    allowed = _ROUNDINGS * _rounding_of_logits(dense, patched)
    step = max(torch.finfo(x.dtype).eps for x in (dense.loss, patched.loss))
    loss = abs(dense.loss.double() - patched.loss.double()).item()
    errors, faults = {"loss": loss}, []
    # a plain sum over the vocabulary, as torch makes it on some CPUs, is off by √V roundings; it
    # is made in fp32 at least, whatever the loss is rounded to
    wandered = min(step, torch.finfo(torch.float32).eps) * words**0.5
    if not loss <= allowed + step * abs(dense.loss.item()) + wandered:
        faults.append(f"loss {patched.loss.item():.6g} instead of {dense.loss.item():.6g}")
    pairs = {name: (x, patched.gradients[name]) for name, x in dense.gradients.items()}
    if dense.logits is not None:
        pairs["logits"] = dense.logits, patched.logits
    for name, (want, got) in pairs.items():
        errors[name] = _relative_error(want, got)
        step = torch.finfo(want.dtype).eps
        if name != "logits":  # a gradient is rounded as the operands were
            step = max(step, dense.step)
        if not errors[name] <= allowed + _ROUNDINGS * step:
            faults.append(f"{name} off by {errors[name]:.2g} of its norm")
    return errors, faults


def _rounding_of_logits(dense: Run, patched: Run) -> float:
    """How far one rounding moves a logit, which is as far as it can move a probability."""
    logits = [run.logits for run in (dense, patched) if run.logits is not None]
    if not logits:
        return torch.finfo(torch.float32).eps
    size = logits[0].abs()
    size = torch.where(size < _MASKED, size, 0).max().item()
    return max(torch.finfo(x.dtype).eps for x in logits) * (1 + size)


def _relative_error(want: Tensor, got: Tensor | None) -> float:
    if got is None or got.shape != want.shape:
        return torch.inf
    want, got = (x.double().clamp(-_MASKED, _MASKED) for x in (want, got))
    return relative_error(got, want)
