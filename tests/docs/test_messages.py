"""The page of errors says what the code says; and what the code says is short."""

from __future__ import annotations

import re

import pytest

from tests.docs.reading import load

LONGEST = 300  # characters
VALUE = 16  # characters of a value in a message; paths may be longer


@pytest.fixture(scope="module")
def errors():
    """The module ``docs/errors.py``."""
    return load("errors")


def test_every_message_is_listed(errors):
    """After a change of a message: python docs/errors.py."""
    page = errors.PAGE.read_text(encoding="utf-8")
    assert page.split(errors.MARK)[1].strip() == errors.listing().strip(), "python docs/errors.py"
    assert page.count("\n- `") > 200


def test_the_messages_that_are_explained_exist(errors):
    """The first column of each table is a text of the code, an ellipsis standing for anything."""
    told = [" ".join(message.text.split()) for message in errors.messages()]
    page = errors.PAGE.read_text(encoding="utf-8").split(errors.MARK)[0]
    explained = re.findall(r"^\| `([^`]+)` (?:\(a warning\) )?\|", page, re.MULTILINE)
    assert len(explained) > 30
    for text in explained:
        pattern = ".*".join(map(re.escape, text.split("…")))
        assert any(re.fullmatch(pattern, one) for one in told), text


def test_no_message_is_long(errors):
    """At most 300 characters, values as long as usual ones; a command to copy comes beside."""
    for message in errors.messages():
        text = message.text.replace(errors.VALUE, "?" * VALUE)
        assert len(text) <= LONGEST, f"{message.path}:{message.line}: {text}"
