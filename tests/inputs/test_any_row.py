"""Rows of any shape end in tokens or in a sentence that names file and line."""

import json
import random

import pytest

from str_kernels.inputs.data import check_prompts, encode_file, read_numbered
from tests.inputs.test_jsonl import written
from tests.inputs.test_template import WITH_TOOLS, tokenizer_with

KEYS = (
    *("messages", "prompt", "response", "role", "content", "tools", "functions", "weight", "id"),
    *("train", "loss_mask", "tool_calls", "function_call", "function", "name", "completion"),
    *("conversations", "from", "value", "instruction"),
)
ROLES = ("user", "assistant", "system", "tool", "gpt", "Assistant")
TEXTS = ("", "  ", "hi", "None", "\u200b", "\ud800", "{}", "[]", '[{"name": "clock"}]', "{{ x }}")
CALLS = ([{"function": {"name": "clock", "arguments": {}}}], [{"name": "clock"}], [], None)


class Maker:
    """Makes values, messages and rows, some of them well-formed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def value(self, depth=0):
        one_of = self.random.choice
        plain = one_of((None, True, False, 0, 1, 0.5, float("nan"), 10**30, one_of(TEXTS)))
        if depth > 3 or self.random.random() < 0.6:
            return plain
        some = range(self.random.randrange(3))
        if self.random.random() < 0.5:
            return [self.value(depth + 1) for _ in some]
        return {one_of(KEYS): self.value(depth + 1) for _ in some}

    def message(self):
        one_of = self.random.choice
        made = {"role": one_of(ROLES[: one_of((2, 4, 6))]), "content": one_of((*TEXTS[2:4], None))}
        if self.random.random() < 0.4:
            made["tool_calls"] = one_of(CALLS)
        if self.random.random() < 0.3:
            made[one_of(KEYS)] = self.value()
        return self.value() if self.random.random() < 0.05 else made

    def row(self):
        kind = self.random.random()
        if kind < 0.2:
            made = {"prompt": "hi", "response": self.value()}
        elif kind < 0.9:
            messages = [self.message() for _ in range(self.random.randrange(1, 4))]
            made = {"messages": [*messages, {"role": "assistant", "content": "ho"}]}
        else:
            return self.value()
        if self.random.random() < 0.3:
            made[self.random.choice(KEYS)] = self.value()
        return made


@pytest.mark.parametrize("seed", range(4))
def test_any_row_is_read_or_refused_by_file_and_line(tmp_path, seed):
    """No other error than a ValueError of the row; some rows are read, some refused."""
    maker, tokenizer, ends = Maker(seed), tokenizer_with(WITH_TOOLS), {"read": 0, "refused": 0}
    for _ in range(150):
        path = written(tmp_path, '{"prompt": "a", "response": "b"}\n' + json.dumps(maker.row()))
        told = _told(path, tokenizer)
        assert told is None or "rows.jsonl:2: " in told
        ends["read" if told is None else "refused"] += 1
    assert min(ends.values()) > 10


def _told(path, tokenizer):
    """What the error says that a file ends in, if any."""
    try:
        rows = read_numbered(path)
        encode_file(path, rows, tokenizer, max_length=64)
        check_prompts(path, rows, tokenizer, compared=True)
    except ValueError as error:
        return str(error)
    return None
