"""Reading conversations, and naming what is wrong with a file."""

import pytest

from str_kernels.inputs.data import read_jsonl
from str_kernels.inputs.rows import prompt_messages, response_of

GOOD = '{"prompt": "hi", "response": "hello"}\n'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def write(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_both_shapes_are_read(tmp_path):
    """Prompt with response, and chat messages; blank lines do not count."""
    rows = read_jsonl(write(tmp_path, GOOD + "\n" + CHAT))
    assert [response_of(row) for row in rows] == ["hello", "b"]
    assert [prompt_messages(row)[-1]["content"] for row in rows] == ["hi", "a"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{broken", "not JSON"),
        ("[1]", "is a list; must be a JSON object"),
        ('{"question": "hi"}', 'must have "messages", or "prompt"'),
        ('{"prompt": "hi"}', "has no answer"),
        ('{"prompt": "hi", "response": 3}', "response=3: must be text"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, rule):
    """The error names the file, the line and the rule."""
    path = write(tmp_path, GOOD + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{rule}"):
        read_jsonl(path)


def test_all_faults_are_reported_together(tmp_path):
    """Two broken lines make one error that names both."""
    with pytest.raises(ValueError, match=r"(?s)jsonl:1: .*jsonl:3: "):
        read_jsonl(write(tmp_path, "{\n" + GOOD + "[]\n"))


def test_empty_and_missing_files(tmp_path):
    """A file without rows and a file that is not there are named."""
    with pytest.raises(ValueError, match=r"rows\.jsonl: holds no rows"):
        read_jsonl(write(tmp_path, "\n\n"))
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_prompts_alone(tmp_path):
    """Where no answer is needed, null and absent responses are accepted."""
    path = write(tmp_path, '{"prompt": "hi", "response": null}\n{"prompt": "ho"}\n')
    assert [response_of(row) for row in read_jsonl(path, response_required=False)] == [None, None]
