"""Run one case and compare its values and gradients with the fp64 truth, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_cases.draw import Case, draw, draw_options
from benchmarks.random_cases.tolerance import Bounds
from benchmarks.random_cases.truth import Facts, truth_of
from str_kernels import linear_cross_entropy
from str_kernels.backends.torch import backend

_WRONG = 1e300  # the share of what is not finite; JSON has no infinity


def check(seed: int) -> dict[str, Any]:
    """Return a row: what was drawn, and for each result its errors.

    ``errors`` are norms relative to the truth's, None where that is zero; ``shares`` are the
    largest error of a number relative to its own bound, so that one above 1 is a failure. An
    exception is a failure too.
    """
    try:
        with _few_rows_filtered():
            found = _compare(draw(seed))
    except Exception as error:  # whatever it is, the case and its seed are told
        found = {"errors": {}, "shares": {}, "exception": f"{type(error).__name__}: {error}"}
    failed = "exception" in found or any(not share <= 1.0 for share in found["shares"].values())
    return {"seed": seed, "failed": failed, **found, "options": draw_options(seed)}


@contextmanager
def _few_rows_filtered() -> Iterator[None]:
    """Filter as with many rows; by itself a CPU computes so few as a case has exactly."""
    fewest = backend.FEWEST_FILTERED
    backend.FEWEST_FILTERED = 1
    try:
        yield
    finally:
        backend.FEWEST_FILTERED = fewest


def _compare(case: Case) -> dict[str, Any]:
    facts = Facts.of(case)
    truth, bounds = truth_of(facts), Bounds(facts)
    got = run(case)
    rows, labelled = truth.rows, facts.labelled
    want = {"loss": truth.loss, **{name: truth.gradients[name] for name in case.needed}}
    limits = {"loss": bounds.loss(), **bounds.gradients()}
    parts = got.pop("parts")
    got["lse"], want["lse"], limits["lse"] = (
        x.reshape(-1)[labelled] for x in (parts.lse, rows.lse, bounds.lse)
    )
    if rows.safety_logits is not None:
        ids = list(facts.options.safety.token_ids)
        # rows that need no safety logit have NaN
        need = labelled | (facts.weights > 0)
        got["safety_logits"] = parts.safety_logits.reshape(-1, len(ids))[need]
        want["safety_logits"] = rows.safety_logits[need]
        limits["safety_logits"] = bounds.z[need][:, ids] + bounds.unit * want["safety_logits"].abs()
    if "hidden_states" in got and case.dtype == torch.float16:
        # under autocast the gradient was in the dtype to which the hidden states were cast
        got["hidden_states"] = got["hidden_states"].to(case.dtype)
    compared = {
        name: _errors(value.detach(), want[name], limits[name]) for name, value in got.items()
    }
    return {
        "errors": {name: error for name, (error, _) in compared.items()},
        "shares": {name: share for name, (_, share) in compared.items()},
    }


def run(case: Case) -> dict[str, Any]:
    """Return the loss, the parts, and the gradients that the case needs, all by name."""
    leaves = {
        name: x.detach().requires_grad_(name in case.needed) for name, x in case.leaves.items()
    }
    autocast = case.options["autocast"]
    dtype = None if autocast is None else getattr(torch, autocast)
    with torch.autocast("cpu", dtype, enabled=autocast is not None):
        loss, parts = linear_cross_entropy(
            leaves["hidden_states"],
            leaves["weight"],
            case.labels,
            bias=leaves.get("bias"),
            return_parts=True,
            **case.constants,
            **case.settings,
        )
    if case.needed:
        (loss * case.upstream.to(loss.dtype)).sum().backward()
    gradients = {name: leaves[name].grad for name in case.needed}
    return {"loss": loss, "parts": parts, **gradients}


def _errors(got: Tensor, want: Tensor, limit: Tensor) -> tuple[float | None, float]:
    """Return the relative error of the norm, and the largest share of a limit."""
    if got.dtype == torch.float16:  # what is beyond its range is infinite, rightly
        top = torch.finfo(got.dtype).max
        got, want = (x.clamp(-top, top) for x in (got, want))
    got = got.double().reshape(want.shape)
    same = got == want  # infinite ones too
    off = torch.where(same, 0.0, (got - want).abs())
    limit = limit.reshape(want.shape) + 2.0**-52 * want.abs()
    share = torch.where(off == 0, 0.0, off / limit)
    share = share.nan_to_num(nan=_WRONG, posinf=_WRONG)
    largest = share.max().item() if share.numel() else 0.0
    norm = want[want.isfinite()].norm().item()
    error = off.norm().item() / norm if norm > 0 and math.isfinite(norm) else None
    return error, largest
