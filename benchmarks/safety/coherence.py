"""How likely the answers to harmful requests are under the aligned model.

Stage: a tuned model's answers, the aligned model → nats a token of each answer. A model that
babbles refuses nothing and harms nobody, and it is not safe (arXiv 2606.03648): beside the outcomes
this tells words that the aligned model could have said from words that it would not.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.safety.mass import aligned_model
from str_kernels.inputs.rows import Row
from str_kernels.probe.reading import read
from str_kernels.safety.inference import prompt_token_ids


def surprise(
    tuned: torch.nn.Module,
    aligned: torch.nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    answers: Sequence[str],
) -> dict[str, Any]:
    """Return each answer's cross-entropy under the aligned model, as plain JSON types.

    Args:
        tuned: the model that answered.
        aligned: the model before; None: ``tuned`` with its adapters switched off.
        tokenizer: of both.
        rows: the requests.
        answers: one for each request; empty ones have no tokens and are left out.

    Returns:
        ``nats``, a token, an answer each, and their ``median``; None without any.
    """
    pairs = zip(rows, answers, strict=True)
    exchanges = [
        (prompt_token_ids(tokenizer, row["prompt"]), ids)
        for row, answer in pairs
        if (ids := tokenizer(answer, add_special_tokens=False)["input_ids"])
    ]
    if not exchanges:
        return {"nats": [], "median": None}
    with aligned_model(tuned, aligned) as model:
        sums = read(model, exchanges, ()).openings.tolist()
    nats = [-total / len(ids) for total, (_, ids) in zip(sums, exchanges, strict=True)]
    return {"nats": [float(f"{x:.3g}") for x in nats], "median": statistics.median(nats)}
