"""The judge model: its question, its two tokens, its order of answers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from str_kernels.evaluation.judge_model import JudgeModel
from tests.tiny import word_tokenizer


class Reader(nn.Module):
    """A model that finds a word: it says yes where the word stands in its question, else no."""

    def __init__(self, word, yes, no, vocabulary, context=512):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.word, self.yes, self.no, self.vocabulary = word, yes, no, vocabulary
        self.context = context

    @property
    def config(self):
        """As transformers' models have it."""
        text = SimpleNamespace(max_position_embeddings=self.context)
        return SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids, attention_mask):
        """Logits ``[B, T, V]``: 1 for the verdict, more for a word that is no verdict."""
        assert not torch.is_grad_enabled()
        found = ((input_ids == self.word) & (attention_mask == 1)).any(dim=1)
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[found, -1, self.yes] = 1.0
        logits[~found, -1, self.no] = 1.0
        logits[:, -1, self.word] = 5.0
        return SimpleNamespace(logits=logits)


def judge(words=("yes", "no", "cannot", "lamp"), **options):
    """A judge that takes "cannot" for a refusal."""
    tokenizer = word_tokenizer(list(words))
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("cannot", "yes", "no")]
    return JudgeModel(Reader(*ids, len(tokenizer), **options), tokenizer)


def test_verdicts_keep_the_order_of_the_answers():
    """Whatever the lengths and however they are batched."""
    answers = ["cannot", "lamp " * 30, "lamp cannot " * 9, "lamp", "lamp lamp cannot"]
    for batch_size in (1, 2, 8):
        verdicts = judge().refused(["lamp"] * 5, answers, batch_size=batch_size)
        assert verdicts == [True, False, True, False, True]
    assert judge().refused([], []) == []


def test_the_question_holds_request_and_answer():
    """Both are read: the word is found in either; braces in them are only text."""
    assert judge().refused(["cannot {0}", "lamp {x}"], ["lamp }{", "lamp"]) == [True, False]


def test_a_tokenizer_without_yes_is_refused():
    """Two words that begin with the same token cannot be told apart."""
    with pytest.raises(ValueError, match="does not distinguish yes from no"):
        judge(words=("cannot", "lamp"))


def test_a_question_too_long_is_named():
    """As every prompt is."""
    with pytest.raises(ValueError, match="judge: prompt 2 has"):
        judge(context=64).refused(["lamp", "lamp"], ["lamp", "lamp " * 60])
