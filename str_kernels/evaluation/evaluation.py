"""What a model still refuses, and what it can still do: rates with 95 % intervals.

Stage: rows of JSONL files → greedy answers (or those of an earlier run) → a judge or the expected
text → `Rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from str_kernels.evaluation.answers import AnswerFile
from str_kernels.evaluation.judge import Outcome, classify
from str_kernels.evaluation.judge_model import JudgeModel
from str_kernels.evaluation.rates import Rate, exact_match
from str_kernels.evaluation.reasoning import answer_of, open_thought
from str_kernels.inputs.rows import Row, prompt_messages, response_of
from str_kernels.safety.inference import check_fits, generate_greedy, prompt_token_ids

SCHEMA = "str_kernels.evaluation/2"
MOST_LABELS = 50
LONGEST_LABEL = 3  # words
_TAIL = 16  # tokens; the mark that opens a thought has fewer


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; a field is None, or empty, where no rows were given.

    Args:
        refusal_rate: share of the requests to refuse that are refused and not answered as well.
        task_accuracy: share of the task's answers that are the expected ones.
        over_refusal_rate: share of the benign requests that are refused.
        outcomes: what each answer to ``"refusals"`` and ``"benign"`` does, in the order of the
            rows, so that two evaluations can be compared row by row.
        task_right: whether each answer to the task is the expected one, in the order of the rows.
        keys: of the answers in the file of answers, by file, in the order of the rows.
        judge_agreement: how often a judge model and the rules agree on an answer that the rules
            call a refusal or compliance.
    """

    refusal_rate: Rate | None = None
    task_accuracy: Rate | None = None
    over_refusal_rate: Rate | None = None
    outcomes: dict[str, tuple[Outcome, ...]] = field(default_factory=dict)
    task_right: tuple[bool, ...] = ()
    judge_agreement: Rate | None = None
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Count the answers of every outcome, by file."""
        return {
            name: {outcome.value: given.count(outcome) for outcome in Outcome}
            for name, given in self.outcomes.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        rates = ("refusal_rate", "task_accuracy", "over_refusal_rate", "judge_agreement")
        return {
            **{name: (rate := getattr(self, name)) and rate.as_dict() for name in rates},
            "counts": self.counts,
            "outcomes": {n: [o.value for o in given] for n, given in self.outcomes.items()},
            "task_right": list(self.task_right),
            "answers": {name: list(given) for name, given in self.keys.items()},
        }


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    refusals: Sequence[Row] = (),
    task: Sequence[Row] = (),
    benign: Sequence[Row] = (),
    max_new_tokens: int = 64,
    batch_size: int = 8,
    judge: JudgeModel | None = None,
    known: AnswerFile | None = None,
    on_answer: Callable[[], None] | None = None,
) -> Evaluation:
    """Measure a model on rows as ``read_jsonl`` gives them.

    Args:
        model: a causal language model, with or without an adapter, patched or not.
        tokenizer: its tokenizer.
        refusals: requests that should be refused.
        task: requests with the expected answer; where these are a few labels, an answer elsewhere
            that is only a label counts as ``task_word``.
        benign: requests that look harmful and are not.
        max_new_tokens: longest answer.
        batch_size: prompts in one forward pass.
        judge: decides between refusal and compliance; the rules still decide the other outcomes.
        known: answers of earlier runs; new ones are added.
        on_answer: called once for every finished row, known answers included.

    Raises:
        ValueError: a prompt does not fit the model's context, or a task row has no answer.
    """
    for position, row in enumerate(task, start=1):
        if not response_of(row):
            raise ValueError(f"task: row {position} has no expected answer; add one.")
    groups = {"refusals": refusals, "task": task, "benign": benign}
    for name, rows in groups.items():
        check_fits(model, name, _prompts(tokenizer, name, rows), max_new_tokens)
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
    measured = _evaluation(groups, answers, judge, batch_size)
    return measured if known is None else _kept(measured, groups, tokenizer, known)


def _kept(
    measured: Evaluation,
    groups: dict[str, Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    known: AnswerFile,
) -> Evaluation:
    """Write the verdicts into the file of answers; return the evaluation with their keys."""
    verdicts = {name: [str(o) for o in given] for name, given in measured.outcomes.items()}
    verdicts["task"] = ["right" if right else "wrong" for right in measured.task_right]
    keys = {}
    for name, rows in groups.items():
        prompts = _prompts(tokenizer, name, rows)
        for prompt, verdict in zip(prompts, verdicts.get(name, ()), strict=True):
            known.judge(prompt, verdict)
        if prompts:
            keys[name] = tuple(map(known.key, prompts))
    return replace(measured, keys=keys)


def _evaluation(
    groups: dict[str, Sequence[Row]],
    answers: dict[str, list[str]],
    judge: JudgeModel | None,
    batch_size: int,
) -> Evaluation:
    """Judge the answers to every group of rows."""
    right = tuple(
        exact_match(answer_of(answer) or "", response_of(row) or "")
        for row, answer in zip(groups["task"], answers["task"], strict=True)
    )
    labels = task_words(groups["task"])
    judged = {name: groups[name] for name in ("refusals", "benign") if groups[name]}
    outcomes = {
        name: tuple(classify(answer, task_words=labels) for answer in answers[name])
        for name in judged
    }
    agreed: list[bool] = []
    if judge is not None:
        for name, rows in judged.items():
            outcomes[name], same = _judged(judge, rows, answers[name], outcomes[name], batch_size)
            agreed += same
    return Evaluation(
        refusal_rate=_share_refused(outcomes.get("refusals", ())),
        task_accuracy=Rate.of(right) if right else None,
        over_refusal_rate=_share_refused(outcomes.get("benign", ())),
        outcomes=outcomes,
        task_right=right,
        judge_agreement=Rate.of(agreed) if agreed else None,
    )


def task_words(task: Sequence[Row]) -> tuple[str, ...]:
    """Find the labels of a task whose answers are labels: few, short, and repeated.

    Returns:
        The different answers in the order of their first row; none where answers are texts.
    """
    given = [response_of(row) or "" for row in task]
    labels = tuple(dict.fromkeys(given))
    short = all(len(label.split()) <= LONGEST_LABEL for label in labels)
    return labels if short and len(labels) <= min(MOST_LABELS, len(given) / 2) else ()


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
    """Return the greedy answer to each row's request, as text.

    An answer whose thought the prompt has opened begins with the mark that opens it.
    """
    prompts = _prompts(tokenizer, "rows", rows)
    answers = [known.get(prompt) if known is not None else None for prompt in prompts]
    missing = [index for index, answer in enumerate(answers) if answer is None]

    def keep(position: int, token_ids: list[int]) -> None:
        index = missing[position]
        answers[index] = tokenizer.decode(token_ids, skip_special_tokens=True)
        if known is not None:
            known.add(prompts[index], _request(rows[index]), answers[index])
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
    opened = (open_thought(tokenizer.decode(prompt[-_TAIL:])) for prompt in prompts)
    return [mark + (answer or "") for mark, answer in zip(opened, answers, strict=True)]


def _prompts(tokenizer: PreTrainedTokenizerBase, name: str, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of every row's prompt, with its tools."""
    prompts = []
    for position, row in enumerate(rows, start=1):
        try:
            messages = prompt_messages(row)
            prompts.append(prompt_token_ids(tokenizer, messages, row.get("tools")))
        except ValueError as error:
            raise ValueError(f"{name}: row {position}: {error}") from error
    return prompts


def _request(row: Row) -> str:
    """Return the text that the answer follows."""
    return prompt_messages(row)[-1].get("content") or ""


def _judged(
    judge: JudgeModel,
    rows: Sequence[Row],
    answers: Sequence[str],
    outcomes: Sequence[Outcome],
    batch_size: int,
) -> tuple[tuple[Outcome, ...], list[bool]]:
    """Let the judge decide refusal and compliance; return the outcomes, and where it agrees."""
    judged = (Outcome.REFUSAL, Outcome.COMPLIANCE)
    chosen = [index for index, outcome in enumerate(outcomes) if outcome in judged]
    refused = judge.refused(
        [_request(rows[index]) for index in chosen],
        [answer_of(answers[index]) or "" for index in chosen],
        batch_size=batch_size,
    )
    result = list(outcomes)
    for index, verdict in zip(chosen, refused, strict=True):
        result[index] = Outcome.REFUSAL if verdict else Outcome.COMPLIANCE
    return tuple(result), [result[index] is outcomes[index] for index in chosen]


def _share_refused(outcomes: Sequence[Outcome]) -> Rate | None:
    return Rate.of(outcome is Outcome.REFUSAL for outcome in outcomes) if outcomes else None
