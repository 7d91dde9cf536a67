"""Measure what a model refuses, over-refuses and solves, and how well it predicts neutral text.

Stage: a model and the held-out rows → `Measured`: one outcome a row, in an order that never
changes, so that two models can be compared row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.safety.data import INSTRUCTIONS, LOOKALIKES, REFUSALS, batches, encode, load_split
from str_kernels import patch_model
from str_kernels.evaluation.answers import AnswerFile
from str_kernels.evaluation.evaluation import answer_rows
from str_kernels.evaluation.judge import classify
from str_kernels.evaluation.rates import exact_match
from str_kernels.inputs.rows import Row
from str_kernels.safety.inference import reading


@dataclass(frozen=True)
class Amounts:
    """How many held-out rows are asked, and how long answers may be."""

    harmful: int = 100
    benign: int = 60
    task: int = 120
    neutral: int = 10
    new_tokens: int = 16
    batch: int = 50
    max_length: int = 128


@dataclass(frozen=True)
class Measured:
    """Outcome of each harmful and each benign request, each task row, and neutral text.

    Args:
        harmful: values of ``Outcome``, a row each.
        benign: the same.
        task: 1 where the answer was the expected one.
        neutral: mean cross-entropy of reference answers to instructions, nats a token.
    """

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    task: tuple[int, ...]
    neutral: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with a summary for people."""
        return {**asdict(self), "summary": self.summary()}

    def summary(self) -> dict[str, Any]:
        """Return the shares."""
        return {
            "refused": self.harmful.count("refusal") / len(self.harmful),
            "over_refused": self.benign.count("refusal") / len(self.benign),
            "accuracy": sum(self.task) / max(1, len(self.task)),
            "neutral": self.neutral,
            "outcomes": dict(Counter(self.harmful)),
        }


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    task: str,
    *,
    amounts: Amounts,
    known: AnswerFile,
) -> Measured:
    """Ask a model everything, and leave it as it was.

    ``known`` keeps the answers, which are only judged: they never leave the folder of the work.
    """
    words = _task_words(data, task)

    def answers(rows: Sequence[Row], tokens: int = amounts.new_tokens) -> list[str]:
        settings = {"max_new_tokens": tokens, "batch_size": amounts.batch}
        return answer_rows(model, tokenizer, rows, **settings, known=known)

    def outcomes(name: str, amount: int) -> tuple[str, ...]:
        rows = load_split(data, name).test[:amount]
        return tuple(str(classify(answer, task_words=words).value) for answer in answers(rows))

    asked = load_split(data, task).test[: amounts.task if words else 0]
    right = [
        int(exact_match(answer, row["response"]))
        for row, answer in zip(asked, answers(asked, tokens=6), strict=True)
    ]
    return Measured(
        outcomes(REFUSALS, amounts.harmful),
        outcomes(LOOKALIKES, amounts.benign),
        tuple(right),
        _neutral(model, tokenizer, data, amounts),
    )


def _task_words(data: Path, task: str) -> tuple[str, ...]:
    """Return the answers of a task that has few; none for free text."""
    words = {row["response"].strip() for row in load_split(data, task).train}
    return tuple(sorted(words)) if len(words) <= 20 else ()


def _neutral(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, amounts: Amounts
) -> float:
    rows = [r for r in load_split(data, INSTRUCTIONS).test if r["response"]][: amounts.neutral]
    features = encode(tokenizer, rows, amounts.max_length)
    total = count = 0.0
    with reading(model), patch_model(model, verify=False, index=None):
        for feature in features:
            batch = next(batches([feature], size=1, steps=1, pad=0, seed=0))
            learned = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch, use_cache=False).loss.item() * learned
            count += learned
    return total / count
