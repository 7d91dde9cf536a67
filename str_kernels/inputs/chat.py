"""From a conversation to token ids and labels, with the model's own chat template.

Stage: messages → the template's text, cut into spans (prompts and answers) → token ids ``[T]`` and
labels ``[T]``, which are -100 except on the assistant's turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100

# Tokenizers of base models have no template of their own. This one writes
#   ### User:⏎ the request ⏎⏎### Assistant:⏎ the answer <end of text>
# A newline ends every heading, so that no tokenizer joins a heading with the text after it.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '\n\n' if not loop.first else '' }}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One training sequence: T token ids, and T labels that are not shifted."""

    input_ids: list[int]
    labels: list[int]  # ``IGNORED`` where nothing is to be learned
    cut: int = 0  # tokens of the last response that did not fit
    skipped_turns: int = 0  # earlier answers that later turns change: read but not learned

    @property
    def targets(self) -> int:
        """The number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the default one; return whether it was needed.

    Raises:
        ValueError: the default template needs an end token, and the tokenizer has none.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer has neither a chat template nor an end token, so that answers would never "
            "end: set one of the two."
        )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer_next: bool = False
) -> str:
    """Return the conversation as text; ``answer_next`` begins the assistant's turn.

    Raises:
        ValueError: the template rejects the conversation, for example a role it does not know.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=answer_next,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template rejects this conversation: {error}.") from error


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, max_length: int
) -> Encoded:
    """Return token ids and labels of one conversation that ends with an answer.

    Prompts are tokenised separately, exactly as when the model generates.

    Raises:
        ValueError: the prompt leaves no room for an answer, or the template rewrites the prompt.
    """
    spans, skipped = _spans(tokenizer, messages)
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learned in spans:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        last_start = len(input_ids)
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    if last_start >= max_length:
        raise ValueError(
            f"the prompt has {last_start} tokens and leaves no room for an answer; the limit is "
            f"{max_length}: raise the maximal length, or shorten the prompt."
        )
    if not any(label != IGNORED for label in labels):
        raise ValueError("the answer has no token to learn.")
    cut = max(0, len(input_ids) - max_length)
    return Encoded(input_ids[:max_length], labels[:max_length], cut, skipped)


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> tuple[list[tuple[str, bool]], int]:
    """Cut the rendered text at the borders of the assistant's turns: ``(text, learned)`` spans.

    The last turn must be the assistant's, and its text must start with its prompt, unchanged. An
    earlier turn whose text does not (some templates drop old reasoning) is counted, not learned.
    """
    whole = render(tokenizer, messages)
    spans, position, skipped = [], 0, 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = render(tokenizer, messages[:turn], answer_next=True)
        end = render(tokenizer, messages[: turn + 1])
        if not (whole.startswith(end) and end.startswith(start) and len(start) >= position):
            if turn == len(messages) - 1:
                raise ValueError(
                    "the chat template rewrites the prompt when an answer follows it, so that the "
                    "answer cannot be separated from the prompt; use another chat template."
                )
            skipped += 1
            continue
        bare = end.rstrip()  # nobody generates white space after the token that ends a turn
        end = bare if bare.endswith(tuple(tokenizer.all_special_tokens)) else end
        spans += [(whole[position : len(start)], False), (end[len(start) :], True)]
        position = len(end)
    return [span for span in spans if span[0]], skipped


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
