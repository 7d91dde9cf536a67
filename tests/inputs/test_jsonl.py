"""JSON that is not one object a line, or no text: the file, the line, and the way to convert it."""

import json
import shlex
import subprocess
import sys

import pytest

from str_kernels.inputs.data import read_jsonl

GOOD = {"prompt": "hi", "response": "hello"}
PAIR = [GOOD, {"prompt": "hö", "response": 'a "b"'}]


def written(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def converted(path, message):
    """Follow the advice of an error, as a shell does; returns the new rows."""
    command = next(line for line in message.splitlines() if "convert: " in line)
    command = command.partition("convert: ")[2]
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    assert words[3:] == ["<", "OLD", ">", "NEW.jsonl"]
    new = path.with_name("new.jsonl")
    with path.open() as old, new.open("w") as out:
        subprocess.run([sys.executable, *words[1:3]], stdin=old, stdout=out, check=True)
    return read_jsonl(new)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        (json.dumps(PAIR), "is one JSON array"),
        (json.dumps(PAIR, indent=2), "is one JSON array"),
        ("\n".join(json.dumps(row, indent=2) for row in PAIR), "has JSON over several lines"),
        (json.dumps(GOOD, indent=2) + "\n", "has JSON over several lines"),
    ],
)
def test_another_layout_is_named_and_converted(tmp_path, text, layout):
    """An array and pretty-printed objects: the command in the error makes the file readable."""
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {layout}; must have one JSON") as caught:
        read_jsonl(path)
    assert converted(path, str(caught.value)) == PAIR[: text.count("prompt")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (r'{"prompt": "a\ud83d", "response": "b"}', r"holds \\ud83d alone"),
        (r'{"prompt": "a", "response": "\uDC00b"}', r"holds \\udc00 alone"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"prompt": "a", "response": "b", "prompt": "c"}', "has the key 'prompt' twice"),
        ('{"prompt": "a", "response": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_a_line_that_is_no_text(tmp_path, line, rule):
    """Half characters, endless nesting, hidden values, endless numbers: file, line and rule."""
    path = written(tmp_path, json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{rule}"):
        read_jsonl(path)


def test_a_character_in_two_halves_is_one(tmp_path):
    """JSON may write a character outside the first plane as two escapes."""
    path = written(tmp_path, r'{"prompt": "\ud83d\ude00", "response": "b"}')
    assert read_jsonl(path)[0]["prompt"] == "\N{GRINNING FACE}"


def test_a_file_of_another_encoding(tmp_path):
    """Bytes that are no UTF-8 are named, and what the file must be."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 0\); must be JSON Lines"):
        read_jsonl(path)


def test_a_broken_first_line_is_a_fault_of_the_line(tmp_path):
    """No layout is guessed where the rest of the file is not JSON either."""
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not JSON"):
        read_jsonl(written(tmp_path, "{oops\n" + json.dumps(GOOD) + "\n"))
