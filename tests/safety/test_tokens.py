"""Safety tokens: found on a model that refuses, kept in a file, refused for another tokenizer."""

import json
from dataclasses import replace

import pytest
import torch

from str_kernels import SafetyConstraint, SafetyTokens, patch_model
from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.safety import identify as identification
from str_kernels.safety.identify import mean_probabilities, select
from tests.tiny import WORDS, byte_tokenizer, exchanges, llama, word_tokenizer

FORBIDDEN = [question for question, _ in exchanges(forbidden=True)][:12]
HARMLESS = [question for question, _ in exchanges(forbidden=False)][:12]
TEMPLATES = ["I am sorry , I cannot help with that .", "Sorry , I must decline ."]


@pytest.fixture(scope="module")
def aligned(aligned_model_dir):
    """The aligned tiny model and its tokenizer."""
    return load_model_and_tokenizer(aligned_model_dir, device="cpu")


@pytest.fixture(scope="module")
def found(aligned):
    """What identify finds on it."""
    return SafetyTokens.identify(
        *aligned, templates=TEMPLATES, prompts=FORBIDDEN, benign_prompts=HARMLESS, top_k=10
    )


def test_identify_finds_the_words_of_the_refusal(found):
    """The words that the model refuses with come out, those that it helps with do not."""
    words = set(found.tokens)
    assert {"I", "am", "sorry", "cannot", "help", "with", "that"} <= words
    assert not words & {"sure", "here", "how", "you", "is"}


def test_identify_leaves_out_special_tokens_and_punctuation(found):
    """The comma, the full stop and the end token are raised by refusing too, and are no words."""
    assert not set(found.tokens) & {",", ".", "<end>", "<bot>"}


def test_identify_sorts_by_score(found, aligned):
    """Highest first; the record names the model and fits its tokenizer."""
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert found.scores[0] > 0.05
    assert found.model == aligned[0].config.name_or_path
    assert aligned[1].convert_tokens_to_ids(list(found.tokens)) == list(found.token_ids)


def test_identify_leaves_the_model_as_it_was(aligned):
    """Train mode, random state, weights and gradients are untouched."""
    model, tokenizer = aligned
    model.train()
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    SafetyTokens.identify(
        model, tokenizer, templates=TEMPLATES, prompts=FORBIDDEN[:2], benign_prompts=HARMLESS[:2]
    )
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_identify_does_not_depend_on_the_batch(aligned, found):
    """One sequence at a time gives the same tokens and scores to rounding (means of about 1e-1)."""
    one = SafetyTokens.identify(
        *aligned,
        templates=TEMPLATES,
        prompts=FORBIDDEN,
        benign_prompts=HARMLESS,
        top_k=10,
        batch_size=1,
    )
    assert one.token_ids[:7] == found.token_ids[:7]
    assert one.scores == pytest.approx(found.scores, abs=1e-5)


def test_the_defaults_of_the_package_run(aligned):
    """Without texts of the caller the package's own serve: here most words are unknown."""
    assert 1 <= len(SafetyTokens.identify(*aligned, top_k=3)) <= 3


def test_mean_probabilities_are_those_of_the_definition(aligned):
    """Mean over each answer's positions, then over the answers, against one forward each."""
    model, tokenizer = aligned
    pairs = [
        (tokenizer(q)["input_ids"], tokenizer(a)["input_ids"])
        for q, a in exchanges(forbidden=True)[:3]
    ]
    pairs += [(tokenizer("a lamp")["input_ids"], [])]
    expected = torch.zeros(len(tokenizer))
    with torch.no_grad():
        for prompt, answer in pairs:
            probabilities = model(torch.tensor([prompt + answer])).logits[0].softmax(-1)
            first = len(prompt) - 1
            expected += probabilities[first : first + max(1, len(answer))].mean(0) / len(pairs)
    got = mean_probabilities(model, pairs, pad=0, batch_size=2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_never_more_than_a_batch_of_logits(aligned, monkeypatch):
    """No forward of identify asks for logits of more than the answers of one batch."""
    asked = []
    real = identification.last_logits

    def counting(model, rows, keep, pad):
        logits = real(model, rows, keep, pad)
        asked.append((logits.shape[0], logits.shape[1]))
        return logits

    monkeypatch.setattr(identification, "last_logits", counting)
    SafetyTokens.identify(
        *aligned, templates=TEMPLATES, prompts=FORBIDDEN, benign_prompts=HARMLESS, batch_size=3
    )
    longest = max(identification.BENIGN_ANSWER_TOKENS, 10)
    assert all(rows <= 3 and positions <= longest for rows, positions in asked)
    assert len(asked) >= 8


def test_spellings_are_chosen_together():
    """A word raised in sum is taken with every spelling in use, ahead of a weaker word."""
    tokenizer = byte_tokenizer(["sorry", "Sorry", "I am sorry. Sorry, he said lamp lamp"] * 20)
    scores = torch.zeros(len(tokenizer) + 7)  # a head with more rows than tokens
    vocabulary = tokenizer.get_vocab()
    scores[vocabulary["Ġsorry"]], scores[vocabulary["Sorry"]] = 0.3, 0.2
    scores[vocabulary["ĠSorry"]], scores[vocabulary["sorry"]] = 0.01, 0.0001
    scores[vocabulary["Ġlamp"]], scores[vocabulary["."]], scores[-1] = 0.4, 0.9, 0.9

    def chosen(top_k):
        ids, values = select(tokenizer, scores, top_k)
        assert values == [scores[token].item() for token in ids] == sorted(values, reverse=True)
        return [tokenizer.decode([token]) for token in ids]

    assert chosen(6) == [" lamp", " sorry", "Sorry", " Sorry"]
    assert chosen(3) == [" sorry", "Sorry", " Sorry"]
    assert chosen(2) == [" sorry", "Sorry"]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"top_k": 0}, "top_k=0: must be an integer from 1 to 1024"),
        ({"templates": []}, r"templates=\[\]: must be a list with at least one entry"),
        ({"templates": "I cannot"}, "templates='I cannot': must be a list"),
        ({"prompts": ["a", " "]}, r"prompts\[1\]=' ': must contain text"),
        ({"prompts": ["steal " * 200]}, r"prompt 1 has 202 tokens.*context of 128"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_unusable_arguments_are_named(aligned, options, rule):
    """Wrong lists, counts and lengths are refused by name and value."""
    with pytest.raises(ValueError, match=rule):
        SafetyTokens.identify(*aligned, **options)


def test_from_strings(aligned):
    """Each string's tokens, once, in order, without its punctuation; scores are not invented."""
    tokens = SafetyTokens.from_strings(aligned[1], ["sorry", "I cannot , I will not .", "sorry"])
    assert tokens.tokens == ("sorry", "I", "cannot", "will", "not")
    assert tokens.scores is None


@pytest.mark.parametrize("string", ["", ",", "<end>", "unheard"])
def test_from_strings_refuses_what_has_no_token(aligned, string):
    """Punctuation, special tokens and unknown words are named, not dropped."""
    with pytest.raises(ValueError, match=rf"strings\[1\]={string!r}"):
        SafetyTokens.from_strings(aligned[1], ["sorry", string])


def test_from_strings_refuses_one_string_and_none(aligned):
    """A lone string would be read letter by letter; an empty list holds nothing."""
    with pytest.raises(ValueError, match="must be a list of strings"):
        SafetyTokens.from_strings(aligned[1], "sorry")
    with pytest.raises(ValueError, match="strings is empty"):
        SafetyTokens.from_strings(aligned[1], [])


def test_constraint(found):
    """The constraint holds exactly these tokens, with the options of SafetyConstraint."""
    constraint = found.constraint(0.5, "kl", temperature=2.0)
    assert constraint == SafetyConstraint(found.token_ids, 0.5, "kl", temperature=2.0)


def test_save_and_load(found, aligned, tmp_path):
    """What was saved comes back whole, and the tokenizer that it was made with accepts it."""
    found.save(tmp_path / "tokens.json")
    assert SafetyTokens.load(tmp_path / "tokens.json", aligned[1]) == found
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


def test_another_tokenizer_is_refused(found, tmp_path):
    """The error names the file and the first token that differs."""
    found.save(tmp_path / "tokens.json")
    other = word_tokenizer(list(reversed(WORDS)))
    with pytest.raises(ValueError, match=r"tokens\.json: was made with another tokenizer \(token "):
        SafetyTokens.load(tmp_path / "tokens.json", other)
    longer = word_tokenizer([*WORDS, "unused"])
    with pytest.raises(ValueError, match="the vocabulary or the special tokens differ"):
        SafetyTokens.load(tmp_path / "tokens.json", longer)


def test_a_damaged_token_id_is_refused(found, aligned, tmp_path):
    """One that the tokenizer does not have, or that is another token than its text."""
    for wrong in (10**11, min(set(range(len(aligned[1]))) - set(found.token_ids))):
        replace(found, token_ids=(*found.token_ids[:-1], wrong)).save(tmp_path / "tokens.json")
        with pytest.raises(ValueError, match=rf"tokens\.json: is damaged \(token {wrong} is "):
            SafetyTokens.load(tmp_path / "tokens.json", aligned[1])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: "{", "is not JSON"),
        (lambda data: json.dumps([1]), "schema=None: must be 'str_kernels.safety_tokens/1'"),
        (lambda data: json.dumps(data | {"schema": "x/9"}), "schema='x/9': must be"),
        (lambda data: json.dumps(data | {"token_ids": 7}), "token_ids=7: must be a list"),
        (lambda data: json.dumps(data | {"token_ids": [1, 1]}), "must hold each id once"),
        (lambda data: json.dumps(data | {"tokens": ["a"]}), "tokens has 1 entries"),
        (lambda data: json.dumps(data | {"scores": ["x"] * 10}), "could not convert"),
    ],
)
def test_a_broken_file_is_named(found, tmp_path, change, rule):
    """Whatever is wrong in the file, the error starts with its name."""
    path = tmp_path / "tokens.json"
    found.save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=rf"tokens\.json: .*{rule}"):
        SafetyTokens.load(path)


def test_a_missing_file_is_named(tmp_path):
    """And the error says what makes one."""
    with pytest.raises(ValueError, match=r"none\.json: no such file; .*str-kernels tokens"):
        SafetyTokens.load(tmp_path / "none.json")


def test_identify_on_a_byte_level_model():
    """A vocabulary with leading spaces and raw bytes: only words come out, all of them tokens."""
    tokenizer = byte_tokenizer(TEMPLATES + FORBIDDEN + HARMLESS)
    model = llama(len(tokenizer))
    tokens = SafetyTokens.identify(
        model, tokenizer, prompts=FORBIDDEN[:4], benign_prompts=HARMLESS[:4]
    )
    assert all(any(letter.isalnum() for letter in text) for text in tokens.tokens)


def test_identify_on_a_patched_model(aligned_model_dir, found):
    """The fused loss on the model changes neither tokens nor scores, and stays on it."""
    model, tokenizer = load_model_and_tokenizer(aligned_model_dir, device="cpu")
    with patch_model(model, found.constraint(1.0), reference="adapter_off"):
        model.train()
        again = SafetyTokens.identify(
            model, tokenizer, templates=TEMPLATES, prompts=FORBIDDEN, benign_prompts=HARMLESS,
            top_k=10,
        )  # fmt: skip
    assert again.token_ids == found.token_ids
    assert again.scores == pytest.approx(found.scores, abs=1e-6)


def test_the_representation_is_one_line():
    """How many there are, of which model, and the first of them."""
    few = SafetyTokens((1, 2), ("sorry", " no\n"))
    assert repr(few) == "<SafetyTokens: 2: 'sorry', ' no\\n'>"
    many = SafetyTokens(tuple(range(64)), tuple(f" t{i}" for i in range(64)), model="my-model")
    assert repr(many).startswith("<SafetyTokens: 64 of my-model: ' t0', ' t1', ")
    assert repr(many).endswith(", …>")
    assert len(repr(many)) < 100
