import pytest

from benchmarks.safety.identification import identification, overlap
from str_kernels.safety.tokens import SafetyTokens
from tests.tiny import align, llama, word_tokenizer


def test_an_aligned_model_is_asked_in_halves():
    tokenizer = word_tokenizer()
    model = llama(len(tokenizer), hidden=64, layers=2)
    align(model, tokenizer, steps=60)
    found = identification(model, tokenizer, 4)
    assert len(found["tokens"]) == len(found["scores"]) <= 4
    assert found["scores"] == sorted(found["scores"], reverse=True)
    shares = [*found["overlap"].values(), found["in_templates"], found["score_share"]]
    assert all(0 <= share <= 1 for share in shares)


def test_overlap_is_of_the_smaller_set():
    few, many = (SafetyTokens(ids, [str(i) for i in ids]) for ids in ((1, 2), (2, 3, 4)))
    assert overlap(few, many) == overlap(many, few) == pytest.approx(1 / 2)
