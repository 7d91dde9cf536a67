"""From a conversation to token ids and labels, with the model's own chat template.

Stage: messages → the template's text, cut into spans (prompts and answers) → token ids ``[T]`` and
labels ``[T]``, which are -100 except on the assistant's turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.rows import Messages, is_learned
from str_kernels.inputs.template import Tools, apply, render, template_text

IGNORED = -100

Piece = tuple[list[int], bool]  # token ids, and whether they are learned

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class LongPrompt(ValueError):
    """A prompt leaves no room for an answer; ``tokens`` is its length."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and leaves no room for an answer; the limit is "
            f"{limit}."
        )
        self.tokens = tokens


class Inseparable(ValueError):
    """A chat template writes the prompt otherwise when an answer follows."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence: T token ids, and T labels that are not shifted."""

    input_ids: list[int]
    labels: list[int]  # ``IGNORED`` where nothing is to be learned
    cut: int = 0  # tokens of the last response that did not fit
    skipped_turns: int = 0  # answers whose prompt is not what generation sees: not learned
    left_out: int = 0  # tokens of the prompt's middle that did not fit

    @property
    def targets(self) -> int:
        """The number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_length: int,
    tools: Tools = None,
    truncate: bool = False,
) -> Encoded:
    """Return token ids and labels of one conversation that ends with an answer.

    Prompts are tokenised separately, exactly as when the model generates.

    Args:
        tokenizer: its chat template writes the conversation.
        messages: the conversation; an answer that is marked as not learned has no labels.
        max_length: most tokens; the end of the last answer is cut.
        tools: what the template shows of functions that the model may call.
        truncate: leave out the middle of a prompt that leaves no room, so that at least half of
            ``max_length`` is the answer's, if it is as long.

    Raises:
        LongPrompt: the prompt leaves no room for an answer.
        ValueError: nothing is learned, or the template rewrites the prompt.
    """
    pieces, skipped = _pieces(tokenizer, messages, tools)
    input_ids: list[int] = []
    labels: list[int] = []
    start = 0
    for ids, learned in pieces:
        start = len(input_ids)
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    left_out = 0
    if start >= max_length:
        if not truncate:
            raise LongPrompt(start, max_length)
        kept = max_length - min(len(input_ids) - start, max_length // 2)
        left_out = start - kept
        middle = slice(kept // 2, kept // 2 + left_out)
        del input_ids[middle], labels[middle]
    cut = max(0, len(input_ids) - max_length)
    encoded = Encoded(input_ids[:max_length], labels[:max_length], cut, skipped, left_out)
    if not encoded.targets:
        raise ValueError(
            "the answer has no token to learn: it is empty, or marked as not learned; leave the "
            "row out."
        )
    return encoded


def why_not_learnable(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> str | None:
    """Say why the chat template lets nothing be learned from a conversation, if it does not."""
    try:
        _pieces(tokenizer, messages, tools)
    except ValueError as error:
        return str(error)
    return None


def _pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> tuple[list[Piece], int]:
    """Return the token ids in pieces, the last answer last, and the number of skipped turns."""
    try:
        spans, skipped = _spans(tokenizer, messages, tools)
    except Inseparable:
        if not _GENERATION.search(template_text(tokenizer, tools)):
            raise
        return _marked_by_template(tokenizer, messages, tools), 0
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in spans]
    return [(piece, learned) for piece, (_, learned) in zip(ids, spans, strict=True)], skipped


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> tuple[list[tuple[str, bool]], int]:
    """Cut the rendered text at the borders of the assistant's turns: ``(text, learned)`` spans.

    The last turn must be the assistant's, and its text must start with its prompt, unchanged. An
    earlier turn whose text does not (some templates drop old reasoning), or that has no prompt
    (it begins the conversation), is counted, not learned.
    """
    whole = render(tokenizer, messages, tools=tools)
    spans, position, skipped = [], 0, 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = turn == len(messages) - 1
        start = _prompt(tokenizer, messages[:turn], tools, required=last)
        end = whole if last else render(tokenizer, messages[: turn + 1], tools=tools)
        kept = start is not None and len(start) >= position
        if not (kept and whole.startswith(end) and end.startswith(start)):
            if last:
                raise Inseparable(_difference(start, end))
            skipped += 1
            continue
        bare = end.rstrip()  # nobody generates white space after the token that ends a turn
        end = bare if bare.endswith(tuple(tokenizer.all_special_tokens)) else end
        spans += [(whole[position : len(start)], False), (end[len(start) :], is_learned(message))]
        position = len(end)
    return [span for span in spans if span[0]], skipped


def _prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, *, required: bool
) -> str | None:
    """Return the text before an answer; None if an earlier one stands where none is asked for."""
    if not messages and not required:
        return None
    try:
        return render(tokenizer, messages, answer_next=True, tools=tools)
    except ValueError:
        if required:
            raise
        return None


def _difference(prompt: str, text: str) -> str:
    """Say where a prompt and the same conversation with its answer part, and what helps."""
    pairs = enumerate(zip(prompt, text, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
    return (
        "the chat template rewrites the prompt when an answer follows it: it asks with "
        f"{prompt[same:][:30]!r} where it then writes {text[same:][:30]!r}. In chat_template.jinja "
        "beside the tokenizer write both alike, or put {% generation %} and {% endgeneration %} "
        "around what is learned."
    )


def _marked_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools
) -> list[Piece]:
    """Cut at the template's own ``{% generation %}`` tags; the text is tokenised as a whole."""
    found = apply(
        tokenizer, messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = zip(found["input_ids"], found["assistant_masks"], strict=True)
    pieces = [
        ([token for token, _ in run], bool(mask)) for mask, run in groupby(tokens, lambda t: t[1])
    ]
    if pieces and not pieces[-1][1]:
        pieces.pop()  # what follows the last answer
    marks = [is_learned(message) for message in messages if message["role"] == "assistant"]
    if all(marks):
        return pieces
    if len(marks) != sum(mask for _, mask in pieces):
        raise ValueError(
            "the chat template's {% generation %} tags do not mark each answer, so that it is "
            "unknown which one is marked as not learned; use another template."
        )
    answers = iter(marks)
    return [(ids, mask and next(answers)) for ids, mask in pieces]


def collate(features: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, Any]:
    """Pad a batch at its right end: ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]``."""
    ids, labels = (
        [list(feature[name]) for feature in features] for name in ("input_ids", "labels")
    )
    width = max(map(len, ids))

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.long)

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, IGNORED),
    }
