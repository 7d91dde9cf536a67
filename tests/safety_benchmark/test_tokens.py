import pytest

from benchmarks.safety import tokens
from tests.tiny import word_tokenizer


def test_the_commonest_words_of_the_templates(monkeypatch):
    """By how often they stand there; what is no word is left out, and too few are refused."""
    tokenizer = word_tokenizer()
    texts = ("tell me how to clean", "tell me how", "tell me ?")
    monkeypatch.setattr(tokens, "REJECTION_TEMPLATES", texts)
    found = tokens.commonest(tokenizer, 2)
    assert {tokenizer.decode([token]).strip() for token in found} == {"tell", "me"}
    with pytest.raises(ValueError, match=r"top_k=64: the templates have \d words"):
        tokens.commonest(tokenizer, 64)
