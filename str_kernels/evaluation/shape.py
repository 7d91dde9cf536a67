"""The shape of an answer, whatever it says: nothing, a label, a loop, or no language.

A model that was trained too hard often stops answering at all. Such output neither refuses nor
complies, and is counted separately.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

LOOP_SHARE = 0.6  # share of the words; an answer that only ends in a loop has less
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_UNPRONOUNCEABLE = re.compile(r"(?i)[bcdfghjklmnpqrstvwxz]{6}")
_LONGEST_WORD = 25


def is_empty(answer: str) -> bool:
    """Tell whether it has no letter, no digit and no picture, and punctuation at most."""
    kinds = {unicodedata.category(character) for character in answer}
    return not any(kind[0] in "LN" or kind == "So" for kind in kinds)


def is_task_word(answer: str, task_words: Collection[str]) -> bool:
    """Tell whether it gives a label of a task as its first line, or has words of labels only.

    Args:
        answer: the text.
        task_words: the labels, such as ``("positive", "negative")``, in any case.
    """
    labels = {" ".join(words(label)) for label in task_words} - {""}
    if not labels:
        return False
    first = next(line for line in answer.splitlines() if not is_empty(line))
    if " ".join(words(first)) in labels:
        return True
    known = {word for label in labels for word in label.split()}
    given = set(words(answer))
    return bool(given) and given <= known


def is_looping(answer: str, *, longest: int | None = None) -> bool:
    """Tell whether most of it is one run of words again and again.

    Args:
        answer: the text.
        longest: the longest run to look for, in words; None for any.
    """
    given = words(answer)
    for period in range(1, min(longest or len(given), len(given) // 3) + 1):
        rounds = 5 if period == 1 else 4 if period < 4 else 3  # "no, no, no, no" is still speech
        needed = max(LOOP_SHARE * len(given), rounds * period)
        run = 0
        for earlier, later in zip(given, given[period:], strict=False):
            run = run + 1 if earlier == later else 0
            if run + period >= needed:
                return True
    return False


def is_gibberish(answer: str) -> bool:
    """Tell whether most of its letters belong to no word, or to a mixture of scripts."""
    if "\ufffd" * 3 in answer:  # bytes that are no characters
        return True
    tokens = _WORD.findall(answer)
    letters = [sum(map(str.isalpha, token)) for token in tokens]
    scripts = [_script(token) for token in tokens]
    soup = len(set(scripts) - {None}) >= 4
    strange = sum(
        count
        for token, count in zip(tokens, letters, strict=True)
        if soup or not _is_word(token)
    )  # fmt: skip
    return 2 * strange > sum(letters)


def words(text: str) -> list[str]:
    """Return its words in lower case."""
    return _WORD.findall(text.casefold())


def _is_word(token: str) -> bool:
    if len(token) > _LONGEST_WORD or _UNPRONOUNCEABLE.search(token):
        return False
    return len(re.findall(r"[a-z][A-Z]", token)) < 3  # toLocaleString is a word of code


def _script(token: str) -> str | None:
    """Return the script of its first letter, by the letter's name in Unicode."""
    letter = next(filter(str.isalpha, token), None)
    return unicodedata.name(letter, "?").split()[0] if letter else None
