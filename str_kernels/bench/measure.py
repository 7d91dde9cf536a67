"""Measure one contender on one case: time, memory, errors, or a line that says why not."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench.clock import bare_product, paired
from str_kernels.bench.contenders import Contender
from str_kernels.bench.inputs import Case
from str_kernels.bench.memory import peak_bytes, within_free_memory
from str_kernels.bench.report import Row
from str_kernels.bench.truth import Truth, constraint_error, errors
from str_kernels.functional import linear_cross_entropy
from str_kernels.vocabulary import VocabularyIndex

_NO_MEMORY = "does not fit into memory"


def measure(
    contender: Contender,
    case: Case,
    *,
    truth: Truth | None = None,
    trainable: bool = False,
    **timing: Any,
) -> Row:
    """Return a row of results; ``truth`` None leaves the errors out, ``timing`` goes to ``paired``.

    A peer that is not installed, does not fit into memory or fails is a row with its ``reason``.
    Our own failures are raised.
    """
    names = {"contender": contender.name, "about": contender.about}
    row: Row = {**names, **case.facts, "trainable": trainable}
    reason = contender.missing()
    if reason is None:
        try:
            with within_free_memory(case.hidden_states.device):
                return row | _measured(contender, case, truth, trainable, timing)
        except Exception as error:  # whatever somebody else's code may raise: reported, not hidden
            reason = _reason(error)
            if contender.package is None and reason != _NO_MEMORY:
                raise
    return row | {"reason": reason}


def _measured(
    contender: Contender, case: Case, truth: Truth | None, trainable: bool, timing: dict[str, Any]
) -> Row:
    device = case.hidden_states.device
    outcome = contender.run(case, trainable=trainable)  # compiles, builds an index
    found: Row = {}
    if truth is not None and contender.name == "ours-str":  # its loss has another term
        found = {"constraint_error": constraint_error(case, truth)}
    elif truth is not None:
        found = errors(truth, *outcome)
    del outcome
    run = partial(contender.run, case, trainable=trainable)
    product = bare_product(case.hidden_states, case.weight)
    timed = paired(run, product, device=device, **timing)
    peak = peak_bytes(run, device)
    return found | timed.as_row() | {"peak_bytes": peak.peak, "kept_bytes": peak.kept}


def live_share(case: Case, index: VocabularyIndex | None, **settings: Any) -> tuple[float, float]:
    """Return the shares of (row, tile) pairs that the router keeps, and of probability it leaves.

    ``settings`` are those of ``linear_cross_entropy``; ε is the default one in token order too.
    """
    settings = {"filter_eps": DEFAULT_EPS, "index": index, "return_parts": True} | settings
    _, parts = linear_cross_entropy(case.hidden_states, case.weight, case.labels, **settings)
    return parts.live_share.mean().item(), parts.dead_mass.mean().item()


def _reason(error: Exception) -> str:
    """Say in one line why a contender failed."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", text.lower()):
        return _NO_MEMORY
    return f"failed: {type(error).__name__}: {(text.splitlines() or [''])[0]}"[:200]
