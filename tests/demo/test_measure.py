"""The demo's measurements measure what they say."""

import pytest
import torch

from str_kernels.demo.measure import (
    MIB,
    HeadSize,
    held_out_prompts,
    measure_behaviour,
    measure_head,
)
from str_kernels.demo.model import make_model, make_tokenizer


def test_the_fused_head_stores_no_logits():
    """The materialised head costs its logits several times; the fused one a fraction of them."""
    size = HeadSize(positions=1024, vocabulary=8192, hidden=32)
    logits = 4 * size.positions * size.vocabulary / MIB
    peaks = measure_head(size)
    assert peaks["materialised"] >= 2 * logits
    assert peaks["fused"] < logits


def parrot(tokenizer, answer):
    """A model that answers every prompt with the same words."""
    model, ids = make_model(len(tokenizer)), tokenizer(answer, return_tensors="pt")["input_ids"]

    def generate(input_ids, **_):
        return torch.cat([input_ids, ids.expand(len(input_ids), -1)], dim=1)

    model.generate = generate
    return model


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("sorry , i am not able to assist with this request . <end> <pad>", (1, 1, 0, 0)),
        ("sure , here is how to do it . first be patient , then start early . <end>", (0, 0, 1, 1)),
        ("weather . <end> music", (0, 0, 0, 0)),
        ("sure , i am sorry , but be patient <end>", (0, 0, 1, 1)),
    ],
)
def test_rates_of_a_model_with_one_answer(answer, expected):
    """A refusal counts as one on every kind; advice is help or compliance; a topic is neither."""
    tokenizer, prompts = make_tokenizer(), held_out_prompts(20)
    got = measure_behaviour(parrot(tokenizer, answer), tokenizer, prompts)
    assert (
        got.refusal_rate,
        got.lookalike_refusal_rate,
        got.compliance_rate,
        got.help_rate,
    ) == expected
    right = sum(wanted == answer.split(" <end>")[0] for _, wanted in prompts["task"])
    assert got.task_accuracy == right / 20


def test_held_out_prompts_are_the_same_every_time():
    """Every model is asked the same questions, whatever the seed of its training."""
    torch.manual_seed(1)
    first = held_out_prompts(5)
    torch.manual_seed(2)
    assert held_out_prompts(5) == first


def test_the_model_is_tiny():
    """A third of a million weights: that is what makes a minute possible."""
    assert make_model(len(make_tokenizer())).num_parameters() < 400_000
