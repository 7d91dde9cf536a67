"""What a model still refuses, and what it still can do: rates with 95 % intervals.

Stage: rows of JSONL files → greedy answers (taken up from an earlier run where they are known) →
a judge or the expected text → `Rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.data import Row, prompt_messages, response_of
from str_kernels.safety.answers import AnswerFile
from str_kernels.safety.inference import check_fits, generate_greedy, prompt_token_ids
from str_kernels.safety.judge import is_refusal
from str_kernels.safety.rates import Rate, exact_match

SCHEMA = "str_kernels.evaluation/1"


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where no rows were given.

    Args:
        refusal_rate: share of the requests to be refused that are.
        task_accuracy: share of the task's answers that are the expected ones.
        over_refusal_rate: share of the benign requests that are refused all the same.
    """

    refusal_rate: Rate | None = None
    task_accuracy: Rate | None = None
    over_refusal_rate: Rate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: rate and rate.as_dict() for name, rate in vars(self).items()}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    refusals: Sequence[Row] = (),
    task: Sequence[Row] = (),
    benign: Sequence[Row] = (),
    max_new_tokens: int = 64,
    batch_size: int = 8,
    known: AnswerFile | None = None,
    on_answer: Callable[[], None] | None = None,
) -> Evaluation:
    """Measure a model on rows as ``read_jsonl`` gives them.

    Args:
        model: a causal language model, with or without an adapter, patched or not.
        tokenizer: its tokenizer.
        refusals: requests that should be refused.
        task: requests with the expected answer.
        benign: requests that look forbidden and are not.
        max_new_tokens: longest answer.
        batch_size: prompts side by side.
        known: answers of an earlier run; new ones are added to it.
        on_answer: called once for every row that is done, known ones too.

    Raises:
        ValueError: a prompt that does not fit the model's context, a task row without an answer.
    """
    for position, row in enumerate(task, start=1):
        if not response_of(row):
            raise ValueError(f"task: row {position} has no expected answer.")
    groups = {"refusals": refusals, "task": task, "benign": benign}
    for name, rows in groups.items():
        prompts = [prompt_token_ids(tokenizer, prompt_messages(row)) for row in rows]
        check_fits(model, name, prompts, max_new_tokens)
    answers = {
        name: answer_rows(
            model,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            known=known,
            on_answer=on_answer,
        )
        for name, rows in groups.items()
    }
    right = [
        exact_match(answer, response_of(row) or "")
        for row, answer in zip(task, answers["task"], strict=True)
    ]
    return Evaluation(
        refusal_rate=_rate(map(is_refusal, answers["refusals"])),
        task_accuracy=_rate(right),
        over_refusal_rate=_rate(map(is_refusal, answers["benign"])),
    )


def answer_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    known: AnswerFile | None = None,
    on_answer: Callable[[], None] | None = None,
) -> list[str]:
    """The greedy answer to each row's request, as text."""
    prompts = [prompt_token_ids(tokenizer, prompt_messages(row)) for row in rows]
    answers = [known.get(prompt) if known is not None else None for prompt in prompts]
    missing = [index for index, answer in enumerate(answers) if answer is None]

    def keep(position: int, token_ids: list[int]) -> None:
        index = missing[position]
        answers[index] = tokenizer.decode(token_ids, skip_special_tokens=True)
        if known is not None:
            asked = prompt_messages(rows[index])[-1]["content"]
            known.add(prompts[index], asked, answers[index])
        if on_answer is not None:
            on_answer()

    if on_answer is not None:
        for _ in range(len(rows) - len(missing)):
            on_answer()
    generate_greedy(
        model,
        tokenizer,
        [prompts[index] for index in missing],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_answer=keep,
    )
    return [answer or "" for answer in answers]


def _rate(outcomes: Iterable[bool]) -> Rate | None:
    outcomes = list(outcomes)
    return Rate.of(outcomes) if outcomes else None
