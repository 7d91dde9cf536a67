"""Words, spellings and the identity of a tokenizer."""

import pytest

from str_kernels.safety.vocabulary import fingerprint, is_word, special_ids, spellings, token_text
from tests.tiny import SPECIAL, WORDS, byte_tokenizer, word_tokenizer


@pytest.fixture(scope="module")
def byte_level():
    """A BPE whose vocabulary has "sorry" with and without a space, small and capital."""
    return byte_tokenizer(["sorry", "Sorry", "I am sorry. Sorry, he said."] * 20, size=400)


@pytest.mark.parametrize("raw", ["sorry", "Sorry", "Ġsorry", "ĠSorry"])
def test_spellings_of_one_word_belong_together(byte_level, raw):
    """Whichever spelling one starts from, the same four tokens come out."""
    texts = {token_text(byte_level, token) for token in spellings(raw, byte_level.get_vocab())}
    assert texts == {"sorry", "Sorry", " sorry", " Sorry"}


@pytest.mark.parametrize(
    ("text", "word"),
    [("I", True), (" sorry", True), ("'t", True), ("对", True), ("7", True)]
    + [(text, False) for text in (",", " ...", "\n\n", "", "�", " —")],
)
def test_punctuation_is_no_word(text, word):
    """Only a letter or a digit makes a word, in any script."""
    assert is_word(text) is word


def test_special_tokens_stand_for_no_text():
    """Control, padding and unknown tokens are special; words are not."""
    tokenizer = word_tokenizer()
    assert special_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(SPECIAL))


def test_a_token_that_does_not_exist_has_no_text():
    """A head may have more rows than the tokenizer has tokens."""
    assert token_text(word_tokenizer(), 10_000) == ""


def test_fingerprint_sees_every_change():
    """Another size, two words exchanged, another special token: another fingerprint."""
    same = fingerprint(word_tokenizer())
    assert same == fingerprint(word_tokenizer())
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    special = word_tokenizer()
    special.add_special_tokens({"bos_token": "<user>", "additional_special_tokens": ["four"]})
    others = [word_tokenizer([*WORDS, "more"]), word_tokenizer(swapped), special]
    assert same not in {fingerprint(other) for other in others}


def test_fingerprint_survives_the_choice_of_a_padding_token():
    """Padding with the end token, as is common after loading, does not make another tokenizer."""
    tokenizer = word_tokenizer(["a", "b"])
    tokenizer.pad_token = None
    before = fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert fingerprint(tokenizer) == before
