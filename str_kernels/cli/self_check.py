"""Check the fused loss on this machine: a small random problem, against the oracle in fp64."""

from __future__ import annotations

from typing import Any

import torch

from str_kernels.accuracy import relative_error
from str_kernels.functional import linear_cross_entropy
from str_kernels.options import SafetyConstraint
from str_kernels.vocabulary import VocabularyIndex

# Both are relative to fp64. A sum of 64 terms in fp32 errs by about 1e-6; the filter leaves out
# 2⁻¹¹ of a row's probability, here 1e-4 of the gradient. A wrong formula errs by 1e-2 or more.
EXACT_TOLERANCE = 1e-5
FILTERED_TOLERANCE = 3e-3


def self_check(device: str) -> list[dict[str, Any]]:
    """Compare loss and gradients of a random problem in fp32 with the oracle in fp64.

    The fused loss runs once exactly, and once filtered, with a vocabulary index.
    """
    make = torch.Generator().manual_seed(0)
    rows, vocabulary, hidden, tokens = 48, 2048, 64, (3, 17, 101, 2047)
    weight = torch.randn(vocabulary, hidden, generator=make) / 4
    labels = torch.randint(vocabulary, (rows,), generator=make)
    states = 2 * weight[labels] + 2 * torch.randn(rows, hidden, generator=make)  # labels likely
    labels[::5] = -100
    tensors = {
        "hidden_states": states.to(device),
        "weight": weight.to(device),
        "reference": torch.randn(rows, len(tokens), generator=make).to(device),
    }
    others = {"labels": labels.to(device), "safety": SafetyConstraint(tokens, strength=0.5)}
    truth = _loss_and_gradients(tensors, torch.float64, backend="dense", **others)
    index = VocabularyIndex.build(tensors["weight"], tensors["hidden_states"])
    checks = []
    for what, tolerance, settings in (
        ("exact", EXACT_TOLERANCE, {"filter_eps": 0.0}),
        ("filtered, with an index", FILTERED_TOLERANCE, {"index": index}),
    ):
        got = _loss_and_gradients(tensors, torch.float32, **settings, **others)
        errors = {name: relative_error(got[name], truth[name]) for name in truth}
        passed = all(error < tolerance for error in errors.values())  # NaN fails too
        facts = {"device": device, "what": what, "relative_errors": errors}
        checks.append({**facts, "tolerance": tolerance, "passed": passed})
    return checks


def _loss_and_gradients(
    tensors: dict[str, Any], dtype: torch.dtype, **others: Any
) -> dict[str, Any]:
    copies = {name: value.to(dtype, copy=True) for name, value in tensors.items()}
    leaves = {name: copies[name].requires_grad_(True) for name in ("hidden_states", "weight")}
    loss = linear_cross_entropy(**copies, **others)
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
