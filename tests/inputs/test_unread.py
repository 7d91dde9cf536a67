"""Keys that nothing reads are counted; what the chat template reads is not among them."""

from str_kernels.inputs.unread import sentence, unread_keys
from tests.inputs.test_template import ASK, TOOL, WITH_TOOLS, tokenizer_with
from tests.tiny import word_tokenizer

ANSWER = {"role": "assistant", "content": "hello", "weight": 1}


def test_keys_of_rows_and_messages_are_counted():
    """Each is counted by rows; what is read, or marks an answer, is not named."""
    rows = [
        {
            "messages": [{**ASK, "name": "a"}, {**ANSWER, "name": "b"}],
            "id": 1,
            "prompt": "hi",
            "url": None,
        },
        {"messages": [{**ASK, "tool_calls": None}, ANSWER], "id": 2},
        {"prompt": "hi", "response": "ho", "weight": 1},
    ]
    unread = unread_keys(word_tokenizer(), rows)
    assert unread == {"id": 2, "prompt": 1, "messages' name": 1}
    assert sentence("f.jsonl", unread) == (
        "f.jsonl: nothing reads id (2 rows), messages' name (1 rows), prompt (1 rows); they "
        "change nothing."
    )


def test_what_one_row_shows_is_read():
    """A key that changes the text of any row is read, in all of them."""
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m.content }}{{ m.note if m.note != 'no' else '' }}{% endfor %}"
    )
    rows = [{"messages": [{**ASK, "note": note}, ANSWER]} for note in ("no", "yes", "no")]
    assert unread_keys(tokenizer, rows) == {}
    assert unread_keys(tokenizer, rows[:1]) == {"messages' note": 1}


def test_tools_count_where_the_template_does_not_show_them():
    """Tools are read by a template that writes them, and named where it does not."""
    rows = [{"messages": [ASK, ANSWER], "tools": [TOOL]}]
    assert unread_keys(word_tokenizer(), rows) == {"tools": 1}
    assert unread_keys(tokenizer_with(WITH_TOOLS), rows) == {}


def test_a_role_that_the_template_leaves_out():
    """A template without system messages drops them: they are named; a role that shows is not."""
    system = {"role": "system", "content": "be kind"}
    rows = [{"messages": [system, ASK, ANSWER]}, {"messages": [ASK, ANSWER]}]
    tokenizer = word_tokenizer()
    assert unread_keys(tokenizer, rows) == {}
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    assert unread_keys(tokenizer, rows) == {"messages of the role system": 1}
