"""The forms of a row: what is read, what is refused, and that the advice converts it."""

import json

import pytest

from str_kernels.inputs.data import read_jsonl
from str_kernels.inputs.rows import is_learned, prompt_messages, response_of
from tests.inputs.test_jsonl import converted, written

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def read(folder, *rows, **keywords):
    return read_jsonl(written(folder, "".join(json.dumps(r) + "\n" for r in rows)), **keywords)


@pytest.mark.parametrize(
    ("row", "said", "asked", "answer"),
    [
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "ShareGPT's form", "hi", "ho",
        ),
        (chat({"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}), 'has "from"',
         "hi", "ho"),
        ({"instruction": "add", "input": "1 1", "output": "2"}, "Alpaca's form", "add\n1 1", "2"),
        ({"instruction": "add", "input": "", "output": "2"}, "Alpaca's form", "add", "2"),
        ({"prompt": "hi", "completion": "ho"}, "prompt/completion", "hi", "ho"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "prompt/completion", "hi", "hello"),
        (chat(ASK, {**ANSWER, "role": "Assistant"}), "must be 'assistant'", "hi", "hello"),
        (chat(ASK, {**ANSWER, "role": "model"}), "must be 'assistant'", "hi", "hello"),
        (chat({**ASK, "role": "human"}, {**ANSWER, "role": "gpt"}), "must be 'user'", "hi",
         "hello"),
        (chat({**ASK, "content": [{"type": "text", "text": "hi"}]}, ANSWER), "list of parts", "hi",
         "hello"),
    ],
)  # fmt: skip
def test_another_form_is_named_and_converted(tmp_path, row, said, asked, answer):
    """The command that the error gives, once, makes rows that are read."""
    path = written(tmp_path, 3 * (json.dumps(row) + "\n"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as caught:
        read_jsonl(path)
    assert said in str(caught.value)
    assert str(caught.value).count("convert: ") == 1
    rows = converted(path, str(caught.value))
    assert [response_of(row) for row in rows] == 3 * [answer]
    assert [prompt_messages(row)[-1]["content"] for row in rows] == 3 * [asked]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": "hi", "response": " \n\t"}, "answer of blanks"),
        ({"prompt": "hi", "response": "\u200b"}, "answer of blanks"),
        (chat(ASK, {**ANSWER, "content": "  "}), "answer of blanks"),
        (chat(ASK, {**ANSWER, "content": ""}, ASK, ANSWER), r"messages\[1\] is an answer of"),
        ({"question": "a", "answer": "b"}, "it has 'question', 'answer'"),
        ({"prompt": [ASK], "response": "b"}, 'has a list as "prompt"'),
        (chat(ASK, {**ANSWER, "content": None}), 'must have "role" and "content"'),
        (chat(ASK, {**ANSWER, "content": None, "tool_calls": []}), 'must have "role" and'),
        (chat(ASK, {**ANSWER, "tool_calls": [{"id": 3}]}), "tool_calls=.*: must be a list"),
        (chat(ASK, {**ANSWER, "function_call": {"name": "f"}}), 'must have "tool_calls"'),
        (chat({**ASK, "role": 3}, ANSWER), r'messages\[0\] must have "role"'),
        (chat(ASK, ANSWER, tools="[broken"), "not JSON"),
        (chat(ASK, ANSWER, tools={"a": 1}), "tools=.*: must be a list of objects"),
        (chat(ASK, ANSWER, tools=[TOOL], functions=[TOOL]), "is the old name"),
        (chat(ASK, ANSWER, weight=2.0), r"weight=2\.0: a row has no weight of its own"),
        ({"prompt": "a", "response": "b", "train": False}, "train=False: a row has no weight"),
        (chat(ASK, {**ANSWER, "weight": 0.5}), r"weight=0\.5: must be 0 .* or 1"),
        (chat(ASK, {**ANSWER, "train": "no"}), "train='no': must be 0"),
        (chat(ASK, {**ANSWER, "weight": 1, "loss": False}), "contradict each other"),
        (chat({**ASK, "train": True}, ANSWER), "only the assistant's messages are learned"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, row, rule):
    """Blanks, missing text, calls without a name, marks that ask for what is not done."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{rule}"):
        read(tmp_path, {"prompt": "a", "response": "b"}, row)


def test_tools_have_one_form(tmp_path):
    """A list, its JSON text, and the functions of earlier days; none where the list is empty."""
    bare = TOOL["function"]
    given = [{"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"functions": [bare]}]
    rows = read(tmp_path, *(chat(ASK, ANSWER, **row) for row in given))
    assert [row["tools"] for row in rows] == 3 * [[TOOL]]
    assert not any("functions" in row for row in rows)
    empty = [{"tools": []}, {"tools": None}, {"functions": None, "tools": ""}]
    rows = read(tmp_path, *(chat(ASK, ANSWER, **row) for row in empty))
    assert [list(row) for row in rows] == 3 * [["messages"]]


def test_an_answer_may_be_a_call(tmp_path):
    """Null as content is allowed where tool calls take its place."""
    row = chat(ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]})
    assert read(tmp_path, row) == [row]


@pytest.mark.parametrize("mark", ["weight", "train", "trainable", "training", "loss", "loss_mask"])
def test_marks_of_a_message(tmp_path, mark):
    """0 and false say that it is not learned; 1, true and null that it is."""
    assert not is_learned({**ANSWER, mark: 0})
    assert not is_learned({**ANSWER, mark: False})
    assert all(is_learned({**ANSWER, mark: value}) for value in (1, True, 1.0, None))
    assert read(tmp_path, chat(ASK, {**ANSWER, "content": "", mark: 0}, ASK, ANSWER))


def test_an_answer_that_is_not_needed_may_be_blank(tmp_path):
    """Requests alone are read with whatever answer they have."""
    rows = read(tmp_path, {"prompt": "a", "response": " "}, response_required=False)
    assert rows == [{"prompt": "a", "response": " "}]
