"""Entries of a tokenizer's vocabulary: text, kind, and spellings of one word."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARKS = ("Ġ", "▁")  # how byte-level BPE and sentencepiece write a leading space


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the size, the special tokens and the whole mapping from text to id.

    It does not say which special token pads, since that is often chosen after loading.
    """
    special = sorted(set(tokenizer.all_special_tokens))
    parts = [len(tokenizer), special, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text with its leading space; empty if the tokenizer has no such token."""
    raw = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if raw is None:
        return ""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return " " + text if raw.startswith(SPACE_MARKS) and not text.startswith(" ") else text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that stand for no text: control tokens, unknown, padding."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {token for token, entry in added if entry.special}


def is_word(text: str) -> bool:
    """Tell whether a token's text has a letter or a digit, unlike punctuation and white space."""
    return any(character.isalnum() for character in text)


def spellings(raw: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the ids of a word's spellings: with a leading space or not, capital or small.

    ``raw`` is a vocabulary entry such as ``"Ġsorry"``; each spelling gives the same result.
    """
    word = raw[1:] if raw.startswith(SPACE_MARKS) else raw
    first, rest = word[:1], word[1:]
    cases = dict.fromkeys([first.lower() + rest, first.upper() + rest])
    forms = [mark + case for case in cases for mark in ("", *SPACE_MARKS)]
    return [vocabulary[form] for form in forms if form in vocabulary]
