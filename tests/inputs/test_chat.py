"""From conversations to token ids and labels."""

import pytest
import torch

from str_kernels.inputs.chat import IGNORED, collate, encode_conversation
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
