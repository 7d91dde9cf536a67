"""What chat templates do with tools, calls and conversations that they were not written for."""

import pytest

from str_kernels.inputs.chat import encode_conversation
from str_kernels.inputs.template import DEFAULT_CHAT_TEMPLATE, render
from tests.inputs.test_chat import ANSWER, ASK, learned
from tests.tiny import word_tokenizer

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
# Shows tools and calls, and writes nothing for content null, as Qwen's does.
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ '<tool> ' + t.function.name + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
    "{{ m.content + ' ' if m.content else '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call> ' + c.function.name + ' ' }}{% endfor %}"
    "{{ '<end> ' if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ '<bot> ' if add_generation_prompt else '' }}"
)


def tokenizer_with(template):
    tokenizer = word_tokenizer(["clock", "<tool>", "<call>", "weather", "None", "?", "null"])
    tokenizer.chat_template = template
    return tokenizer


def test_tools_and_calls_are_shown_and_calls_are_learned():
    """The tools stand in the prompt, whose tokens are ignored; the call is the answer."""
    tokenizer = tokenizer_with(WITH_TOOLS)
    encoded = encode_conversation(tokenizer, [ASK, CALLING], max_length=50, tools=[TOOL])
    text = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert text[:3] == ["<tool>", "clock", "<user>"]
    assert learned(tokenizer, encoded) == ["<call>", "clock", "<end>"]


def test_a_template_of_its_own_for_tools():
    """A tokenizer may have several templates: the one for tools is taken where there are tools."""
    tokenizer = tokenizer_with({"default": DEFAULT_CHAT_TEMPLATE, "tool_use": WITH_TOOLS})
    assert render(tokenizer, [ASK], tools=[TOOL]).startswith("<tool> clock <user> ")
    assert render(tokenizer, [ASK]).startswith("### User:")


def test_a_call_that_is_not_shown_is_refused():
    """A template without tool calls would teach an empty answer."""
    with pytest.raises(ValueError, match="does not write tool_calls"):
        render(tokenizer_with(WITH_TOOLS.replace("m.tool_calls", "m.calls")), [ASK, CALLING])


def test_null_is_not_learned_as_a_word():
    """A template that prints Python's None in the content's place is refused, with advice."""
    printing = WITH_TOOLS.replace("m.content + ' ' if m.content else ''", "m.get('content') ~ ' '")
    tokenizer = tokenizer_with(printing)
    with pytest.raises(ValueError, match='writes "None" for content null; give "content": ""'):
        render(tokenizer, [ASK, CALLING])
    asked = {"role": "user", "content": "None ?"}
    assert "<call> clock" in render(tokenizer, [asked, {**CALLING, "content": ""}])
    assert "None ?" in render(tokenizer_with(WITH_TOOLS), [asked, CALLING])


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[9].content }}", "9"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.nothing() }}", "nothing"),
        ("{% for", "unexpected|expected"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_whatever_a_template_does_is_a_sentence(code, fault):
    """Types, indices, division, names, syntax, recursion: the roles are named, with advice."""
    with pytest.raises(ValueError, match=rf"rejects this conversation: .*{fault}") as caught:
        render(tokenizer_with(code), [ASK, ANSWER])
    assert "roles are user, assistant" in str(caught.value)
