"""Thoughts are told from answers, those that the prompt has opened too."""

from types import SimpleNamespace

import pytest

from str_kernels.evaluation import evaluation
from str_kernels.evaluation.evaluation import answer_rows
from str_kernels.evaluation.reasoning import answer_of, open_thought


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|assistant|>\n<think>\n", "<think>"),
        ("<|assistant|>[THINK]", "[THINK]"),
        ("<think></think>\n<|assistant|>", ""),
        ("What does <think> mean?\n<|assistant|>", ""),
        ("", ""),
    ],
)
def test_a_prompt_may_open_the_thought(prompt, mark):
    """At its end alone: a mark that a user writes opens nothing."""
    assert open_thought(prompt) == mark


def test_an_answer_begins_with_the_mark_that_its_prompt_ends_with(monkeypatch):
    """Cut off before the thought's end it is none; and with the end, what follows is the answer."""
    texts = {(0,): "Hi <think>\n", (1,): "Let us see", (2,): "Let us see</think>Hello."}
    given = iter([[1], [2]])
    tokenizer = SimpleNamespace(decode=lambda ids, **options: texts[tuple(ids)])

    def generate(model, tokenizer, prompts, *, on_answer, **options):
        on_answer(0, next(given))

    monkeypatch.setattr(evaluation, "generate_greedy", generate)
    monkeypatch.setattr(evaluation, "_prompts", lambda *args: [[0]])
    found = [answer_rows(None, tokenizer, [{}], max_new_tokens=4)[0] for _ in range(2)]
    assert found == ["<think>Let us see", "<think>Let us see</think>Hello."]
    assert [answer_of(answer) for answer in found] == [None, "Hello."]
