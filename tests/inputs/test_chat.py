"""From conversations to token ids and labels."""

import pytest
import torch

from str_kernels.inputs.chat import IGNORED, LongPrompt, collate, encode_conversation
from str_kernels.inputs.template import DEFAULT_CHAT_TEMPLATE, ensure_chat_template, render
from tests.tiny import byte_tokenizer, word_tokenizer

ASK = {"role": "user", "content": "tell me the topic"}
ANSWER = {"role": "assistant", "content": "weather ."}
MORE = [{"role": "user", "content": "and you ?"}, {"role": "assistant", "content": "no ."}]


def text_of(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def learned(tokenizer, encoded):
    return text_of(tokenizer, [label for label in encoded.labels if label != IGNORED])


def test_only_the_answer_is_learned():
    """Labels are the answer and the token that ends it; every label is the id at its place."""
    tokenizer = word_tokenizer()
    encoded = encode_conversation(tokenizer, [ASK, ANSWER], max_length=50)
    assert learned(tokenizer, encoded) == ["weather", ".", "<end>"]
    assert all(y in (IGNORED, x) for x, y in zip(encoded.input_ids, encoded.labels, strict=True))


def test_every_answer_of_a_conversation_is_learned():
    """With several turns, all of the assistant's are targets and none of the user's."""
    tokenizer = word_tokenizer()
    encoded = encode_conversation(tokenizer, [ASK, ANSWER, *MORE], max_length=50)
    assert learned(tokenizer, encoded) == ["weather", ".", "<end>", "no", ".", "<end>"]
    assert (encoded.cut, encoded.skipped_turns) == (0, 0)


def test_the_prompt_is_what_generation_sees():
    """The tokens before the answer are those of the rendered prompt alone."""
    tokenizer = byte_tokenizer(["tell me the topic weather and you no"])
    encoded = encode_conversation(tokenizer, [ASK, ANSWER], max_length=200)
    prompt = tokenizer(render(tokenizer, [ASK], answer_next=True), add_special_tokens=False)
    assert encoded.input_ids[: len(prompt["input_ids"])] == prompt["input_ids"]
    assert encoded.labels[: len(prompt["input_ids"])] == [IGNORED] * len(prompt["input_ids"])


def test_a_template_that_rewrites_earlier_answers():
    """An answer that later turns change is read, counted and not learned; the last one is."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
        "{{ 'please ' if m['role'] == 'assistant' and loop.last else '' }}{{ m['content'] }} <end> "
        "{% endfor %}{{ '<bot> ' if add_generation_prompt else '' }}"
    )
    encoded = encode_conversation(tokenizer, [ASK, ANSWER, *MORE], max_length=50)
    assert learned(tokenizer, encoded) == ["please", "no", ".", "<end>"]
    assert encoded.skipped_turns == 1


def test_a_long_answer_is_cut_and_a_long_prompt_refused():
    """The end of an answer may go, with a count; a prompt that fills the length is an error."""
    tokenizer = word_tokenizer()
    whole = encode_conversation(tokenizer, [ASK, ANSWER], max_length=50)
    cut = encode_conversation(tokenizer, [ASK, ANSWER], max_length=len(whole.input_ids) - 2)
    assert cut.cut == 2
    assert learned(tokenizer, cut) == ["weather"]
    with pytest.raises(ValueError, match=r"prompt has 6 tokens and leaves no room.*limit is 6"):
        encode_conversation(tokenizer, [ASK, ANSWER], max_length=6)


def test_the_default_template():
    """A tokenizer without a template gets ours, once; its answers end with the end token."""
    tokenizer = byte_tokenizer(["weather topic"], chat=False)
    assert ensure_chat_template(tokenizer)
    assert not ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    text = render(tokenizer, [ASK, ANSWER])
    assert text == "### User:\ntell me the topic\n\n### Assistant:\nweather .<end>"
    encoded = encode_conversation(tokenizer, [ASK, ANSWER], max_length=200)
    assert tokenizer.decode([y for y in encoded.labels if y != IGNORED]) == "weather .<end>"
    bare = byte_tokenizer(["weather"], chat=False)
    bare.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an end token"):
        ensure_chat_template(bare)


def test_a_template_that_refuses_is_an_error_of_the_row():
    """A role that the template does not know is a readable error."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="rejects this conversation: System role not supported"):
        encode_conversation(tokenizer, [ASK, ANSWER], max_length=50)


def test_batches_are_padded_at_the_right_end():
    """Padding is masked and never a target, whatever its id."""
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["labels"].dtype == torch.int64


def turns(*marks):
    """Conversations of one answer each, marked."""
    return [message for mark in marks for message in (ASK, {**ANSWER, **mark})]


def test_a_marked_answer_is_read_and_not_learned():
    """Its labels are ignored, its tokens stay, and the template never sees the mark."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template += (
        "{% for m in messages if m.weight is defined or m.train is defined %}"
        "{{ raise_exception('marked') }}{% endfor %}"
    )
    plain = encode_conversation(tokenizer, turns({}, {}), max_length=50)
    first = encode_conversation(tokenizer, turns({"weight": 0}, {"weight": 1}), max_length=50)
    last = encode_conversation(tokenizer, turns({}, {"train": False}), max_length=50)
    assert plain.input_ids == first.input_ids == last.input_ids
    ends = [place for place, y in enumerate(plain.labels) if y != IGNORED]
    assert len(ends) == 6
    assert [place for place, y in enumerate(first.labels) if y != IGNORED] == ends[3:]
    assert [place for place, y in enumerate(last.labels) if y != IGNORED] == ends[:3]
    with pytest.raises(ValueError, match="no token to learn: it is empty, or marked as not"):
        encode_conversation(tokenizer, turns({"weight": 0}), max_length=50)


def test_a_greeting_is_read_and_not_learned():
    """A conversation that the assistant begins has no prompt for its first message."""
    tokenizer = word_tokenizer()
    encoded = encode_conversation(tokenizer, [ANSWER, ASK, *MORE[1:]], max_length=50)
    assert text_of(tokenizer, encoded.input_ids[:3]) == ["<bot>", "weather", "."]
    assert learned(tokenizer, encoded) == ["no", ".", "<end>"]
    assert encoded.skipped_turns == 1


REWRITING = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
    "{% generation %}{{ m.content + ' ' }}{{ '<end>' if m.role == 'assistant' }}{% endgeneration %}"
    "{{ ' ' }}{% endfor %}{{ '<bot> please' if add_generation_prompt else '' }}"
)


def in_answers_alone(template):
    """The same template with its tags around the assistant's text alone."""
    tagged = template[template.index("{% generation") : template.index("{{ ' ' }}{% endfor")]
    plain = tagged.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    choice = f"{{% if m.role == 'assistant' %}}{tagged}{{% else %}}{plain}{{% endif %}}"
    return template.replace(tagged, choice)


def test_a_template_that_rewrites_the_prompt():
    """The error shows where the texts part, and names the tags that help; with them the answers
    are what the template says, marks included.
    """
    tokenizer = word_tokenizer()
    bare = REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = bare
    with pytest.raises(ValueError, match="rewrites the prompt when an answer follows") as caught:
        encode_conversation(tokenizer, [ASK, ANSWER], max_length=50)
    for text in ("asks with 'please'", "'weather . <end> '", "{% generation %}"):
        assert text in str(caught.value)
    tokenizer.chat_template = in_answers_alone(REWRITING)
    encoded = encode_conversation(tokenizer, [ASK, ANSWER, *MORE], max_length=50)
    assert learned(tokenizer, encoded) == ["weather", ".", "<end>", "no", ".", "<end>"]
    assert (
        encoded.input_ids
        == tokenizer(render(tokenizer, [ASK, ANSWER, *MORE]), add_special_tokens=False)["input_ids"]
    )
    marked = [ASK, {**ANSWER, "weight": 0}, *MORE]
    assert learned(tokenizer, encode_conversation(tokenizer, marked, max_length=50)) == [
        "no", ".", "<end>",
    ]  # fmt: skip
    with pytest.raises(LongPrompt):
        encode_conversation(tokenizer, [ASK, ANSWER], max_length=6)


@pytest.mark.parametrize("words", [1, 3, 40])
def test_a_long_prompt_is_truncated_in_its_middle(words):
    """Beginning and end of the prompt stay, and the answer gets half of the room if it needs it."""
    tokenizer, ask = word_tokenizer(), {"role": "user", "content": "one " + "two " * 30 + "three"}
    answer = {"role": "assistant", "content": "four " * words}
    encoded = encode_conversation(tokenizer, [ask, answer], max_length=16, truncate=True)
    text = text_of(tokenizer, encoded.input_ids)
    room = min(words + 1, 8)  # the end token is learned too
    assert len(text) == 16
    assert text[:2] == ["<user>", "one"]
    assert text[16 - room - 2 : 16 - room] == ["three", "<bot>"]
    assert learned(tokenizer, encoded) == (["four"] * words + ["<end>"])[:room]
    assert encoded.left_out == 34 - (16 - room)
    assert encoded.cut == words + 1 - room
    fits = encode_conversation(tokenizer, [ASK, ANSWER], max_length=50, truncate=True)
    assert fits == encode_conversation(tokenizer, [ASK, ANSWER], max_length=50)
