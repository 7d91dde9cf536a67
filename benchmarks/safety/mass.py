"""How much probability the safety tokens have, and how it is shared, where an answer begins.

Stage: a tuned and the aligned model, harmful requests → numbers a request. A constraint on the
proportions among the K tokens does not see mass that leaves them all together for another word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.rows import Row
from str_kernels.probe.reading import Exchange, answers_of
from str_kernels.safety.inference import last_logits, prompt_token_ids, reading

NAMES = ("mass", "aligned_mass", "among", "with_rest")
POSITIONS = 4  # "I" may be kept, and what follows it not
_BATCH = 16


def held_mass(
    tuned: torch.nn.Module,
    aligned: torch.nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    token_ids: Sequence[int],
) -> dict[str, Any]:
    """Return each request's numbers where its answer begins, as plain JSON types.

    Args:
        tuned: the model after training.
        aligned: the model before; None: ``tuned`` with its adapters switched off.
        tokenizer: of both.
        rows: the requests.
        token_ids: the K safety tokens.

    Returns:
        At the first token, a number a request: ``mass`` and ``aligned_mass``, the K tokens'
        probability; ``among``, the divergence of the proportions among them; ``with_rest``, that of
        K + 1 outcomes, the last of which is all the rest. Their means and the smallest mass are
        under ``summary``; ``along`` has the means at the first tokens, one after another, of what
        the aligned model answers.
    """
    prompts = [prompt_token_ids(tokenizer, row["prompt"]) for row in rows]
    with aligned_model(tuned, aligned) as model:
        answers = answers_of(model, tokenizer, prompts, POSITIONS)
    exchanges = list(zip(prompts, answers, strict=True))
    found = _along(tuned, aligned, exchanges, torch.tensor(token_ids), tokenizer.pad_token_id or 0)
    first = {name: [float(f"{x[0]:.3g}") for x in values] for name, values in found.items()}
    along = {name: _means(values) for name, values in found.items()}
    summary = {name: sum(x[0] for x in values) / len(values) for name, values in found.items()}
    summary["smallest_mass"] = min(x[0] for x in found["mass"])
    return {**first, "summary": summary, "along": along}


def _along(
    tuned: torch.nn.Module,
    aligned: torch.nn.Module | None,
    exchanges: Sequence[Exchange],
    ids: Tensor,
    pad: int,
) -> dict[str, list[list[float]]]:
    """Return each number of each request at each token of its answer, one at least."""
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for start in range(0, len(exchanges), _BATCH):
        part = exchanges[start : start + _BATCH]
        after = _log_outcomes(tuned, part, ids, pad)
        with aligned_model(tuned, aligned) as model:
            before = _log_outcomes(model, part, ids, pad)
        for q, p in zip(before, after, strict=True):
            found["mass"].append((1.0 - p[:, -1].exp()).tolist())
            found["aligned_mass"].append((1.0 - q[:, -1].exp()).tolist())
            found["with_rest"].append(_divergence(q, p).tolist())
            among = (x[:, :-1].log_softmax(-1) for x in (q, p))
            found["among"].append(_divergence(*among).tolist())
    return found


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean at each position, over the requests whose answers are that long."""
    longest = max(map(len, values))
    there = ([x[i] for x in values if len(x) > i] for i in range(longest))
    return [float(f"{sum(x) / len(x):.3g}") for x in there]


@contextmanager
def aligned_model(
    tuned: torch.nn.Module, aligned: torch.nn.Module | None
) -> Iterator[torch.nn.Module]:
    """In this block, the model before training: ``tuned`` without adapters if none is given."""
    with tuned.disable_adapter() if aligned is None else nullcontext():
        yield tuned if aligned is None else aligned


def _log_outcomes(
    model: torch.nn.Module, part: Sequence[Exchange], ids: Tensor, pad: int
) -> list[Tensor]:
    """Log-probabilities ``[T, K + 1]`` of the safety tokens and of all the rest, fp64, of each."""
    lengths = [max(1, len(answer)) for _, answer in part]
    with reading(model):
        rows = [[*request, *answer[:-1]] for request, answer in part]
        every = last_logits(model, rows, max(lengths), pad).double()
    inside = torch.zeros(every.shape[-1], dtype=torch.bool)
    inside[ids] = True
    found = []
    for logits, length in zip(every, lengths, strict=True):
        own = logits[-length:]
        rest = own.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
        found.append(torch.cat([own[:, ids], rest], -1).log_softmax(-1))
    return found


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q ‖ p) [T]``."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)
