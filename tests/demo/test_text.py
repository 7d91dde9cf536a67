"""What the demo's model is taught, and what is kept from it."""

from random import Random

import pytest

from str_kernels.demo.model import UNKNOWN, features, make_tokenizer, prompt_text
from str_kernels.demo.text import (
    ACTS,
    REFUSALS,
    TOPICS,
    alignment_conversations,
    conversation,
    held_out,
    is_refusal,
    task_conversations,
)
from str_kernels.inputs.chat import encode_conversation

KINDS = ("forbidden", "benign", "lookalike", "task")


PHRASES = {
    f"{verb} {owner} {noun}": (verb, noun)
    for acts in ACTS
    for verb in (*acts.fine, *acts.forbidden)
    for owner in acts.owners
    for noun in acts.nouns
}
LONGEST = max(len(phrase.split()) for phrase in PHRASES)


def act_pairs(text):
    """Every (verb, noun) of the grammar that stands in a text."""
    words = text.split()
    spans = (
        " ".join(words[start:end])
        for start in range(len(words))
        for end in range(start + 3, min(start + LONGEST, len(words)) + 1)
    )
    return {PHRASES[span] for span in spans if span in PHRASES}


def topic_pairs(text):
    """Both words of a topic, in any order, that stand in a text."""
    words = set(text.split())
    return {
        frozenset((one, two))
        for topic in TOPICS.values()
        for one in topic
        for two in topic
        if one < two and {one, two} <= words
    }


def found(pairs, which):
    return {pair for request, answer in pairs for pair in which(f"{request} {answer}")}


def test_held_out_pairs_never_occur_in_training():
    """No verb with its noun, and no two words of a topic, that held-out prompts are made of stand
    anywhere in what either training reads, requests and answers, in any order.
    """
    draw = Random(5)
    trained = alignment_conversations(draw, 3000) + task_conversations(draw, 1000)
    tested = [conversation(draw, kind, test=True) for kind in KINDS for _ in range(300)]
    assert found(trained, act_pairs) & found(tested, act_pairs) == set()
    assert found(trained, topic_pairs) & found(tested, topic_pairs) == set()
    assert len(found(tested, act_pairs)) > 100
    assert len(found(tested, topic_pairs)) > 5


def test_about_a_quarter_is_held_out():
    """Both halves are big enough for every kind of act and every topic."""
    for acts in ACTS:
        for verbs in (acts.fine, acts.forbidden):
            pairs = [held_out(verb, noun) for verb in verbs for noun in acts.nouns]
            assert 0.1 < sum(pairs) / len(pairs) < 0.4
    for words in TOPICS.values():
        pairs = [held_out(one, two) for one in words for two in words if one < two]
        assert 0 < sum(pairs) < len(pairs)


def test_forbidden_requests_are_refused_and_nothing_else():
    """The right answer of every kind is a refusal exactly where it should be."""
    draw = Random(1)
    for kind in (*KINDS, "small talk"):
        answers = [conversation(draw, kind)[1] for _ in range(200)]
        assert {is_refusal(answer) for answer in answers} == {kind == "forbidden"}
    assert not is_refusal("sure , i am sorry , but first make a plan")
    assert all(map(is_refusal, REFUSALS))


def test_the_task_never_occurs_in_alignment():
    """What fine-tuning asks, alignment never asked."""
    requests = {request for request, _ in alignment_conversations(Random(2), 3000)}
    assert not any(request.startswith("tell me the topic") for request in requests)


@pytest.mark.parametrize("kind", [*KINDS, "small talk"])
def test_every_word_is_known_and_the_template_is_followed(kind):
    """No word is unknown to the tokenizer, and the demo's fast tokenising equals the chat template
    that `str-kernels train` follows.
    """
    tokenizer, draw = make_tokenizer(), Random(3)
    pairs = [conversation(draw, kind, test=kind != "small talk") for _ in range(200)]
    for (request, answer), made in zip(pairs, features(tokenizer, pairs), strict=True):
        assert tokenizer.unk_token_id not in made["input_ids"]
        messages = [
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer},
        ]
        wanted = encode_conversation(tokenizer, messages, max_length=128)
        assert (made["input_ids"], made["labels"]) == (wanted.input_ids, wanted.labels)
    assert UNKNOWN in tokenizer.tokenize(prompt_text("xyzzy"))
