import pytest

from benchmarks.safety.tokens import rarity
from tests.tiny import word_tokenizer


def test_a_word_that_benign_answers_use_weighs_less():
    tokenizer = word_tokenizer()
    common, rare, unused = (tokenizer(w)["input_ids"][-1] for w in ("music", "rain", "sport"))
    rows = [{"prompt": "", "response": "music music music rain"}]
    weights = rarity((common, rare, unused), tokenizer, rows)
    assert sum(weights) == pytest.approx(3)
    assert weights[2] / weights[1] == pytest.approx(1 + 250)
    assert weights[2] / weights[0] == pytest.approx(1 + 750)
