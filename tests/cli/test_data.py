"""Data that is wrong, marked or has tools, through the three commands that read it."""

import json

import pytest
import torch

from str_kernels import SafetyTokens
from str_kernels.evaluation import evaluation
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.inputs.loading import load_tokenizer
from tests.cli.calling import call
from tests.inputs.test_template import TOOL, WITH_TOOLS
from tests.tiny import WORDS, llama, word_tokenizer

ASK, ANSWER = {"role": "user", "content": "how is rain ?"}, {"role": "assistant", "content": "sure"}
GOOD = json.dumps({"messages": [ASK, ANSWER]})
QUICK = ("--steps", 1, "--batch", 2, "--rank", 4, "--max-length", 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose chat template shows tools, and refuses two users in a row."""
    folder = tmp_path_factory.mktemp("tools")
    tokenizer = word_tokenizer(["<tool>", "<call>", "clock", *WORDS])
    alternating = (
        "{% for m in messages %}{% if loop.previtem is defined and m.role == 'user' and "
        "loop.previtem.role == 'user' %}{{ raise_exception('two users') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = WITH_TOOLS + alternating
    tokenizer.save_pretrained(folder)
    llama(len(tokenizer)).save_pretrained(folder)
    SafetyTokens.from_strings(load_tokenizer(folder), ["sorry", "cannot"]).save(folder / "t.json")
    return folder


@pytest.fixture
def commands(model, tmp_path, capsys):
    """Run train, cache and evaluate on the same text; returns what each left behind."""
    data, tokens = tmp_path / "data.jsonl", ("--tokens", model / "t.json")
    given = {
        "train": (*tokens, "--out", tmp_path / "out", *QUICK),
        "cache": (*tokens, "--out", tmp_path / "refs.safetensors", *QUICK[2:4], *QUICK[6:]),
    }

    def run(name, text, *more):
        data.write_text(text)
        words = ("--task", data) if name == "evaluate" else (data, *given[name])
        return call(capsys, name, model, *words, *more)

    return run


EVERY = pytest.mark.parametrize("name", ["train", "cache", "evaluate"])


@EVERY
@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "a\\ud800", "response": "b"}', "holds \\ud800 alone"),
        ("[" * 3000, "nested too deep"),
        ('{"prompt": "a", "response": "  "}', "an answer of blanks"),
        ('{"conversations": []}', "ShareGPT"),
        (json.dumps({"messages": [ASK, ANSWER], "weight": 2}), "weight=2"),
        (json.dumps({"messages": [ASK, ASK, ANSWER]}), "rejects this conversation: two users"),
    ],
)
def test_every_command_refuses_it_in_the_same_words(commands, name, line, rule):
    """File, line and rule; exit code 2, no trace, and no weight is read."""
    called = commands(name, GOOD + "\n" + line + "\n")
    assert (called.code, called.out) == (2, "")
    assert "data.jsonl:2: " in called.err
    assert rule in called.err
    assert "Traceback" not in called.err
    assert "loading the model" not in called.err


@EVERY
def test_a_layout_is_refused_in_the_same_words(commands, name):
    """A file that is one JSON array is not read line by line."""
    called = commands(name, json.dumps([json.loads(GOOD)], indent=1))
    assert called.code == 2
    assert "is one JSON array; must have one JSON object on each line" in called.err


@EVERY
def test_a_greeting_is_taken_and_unread_keys_are_named(commands, name):
    """One rule: all three take a row that the assistant begins; all name what they do not read."""
    row = {"messages": [ANSWER, ASK, {**ANSWER, "name": "b"}], "id": 1}
    called = commands(name, json.dumps(row) + "\n")
    assert called.code == 0, called.err
    assert called.err.count("nothing reads id (1 rows), messages' name (1 rows)") == 1


def test_tools_reach_the_template_everywhere(commands, model, tmp_path, monkeypatch):
    """The tool stands in what is trained on, what is cached, and what is asked."""
    seen = []
    real = evaluation.generate_greedy

    def watching(model, tokenizer, prompts, **keywords):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return real(model, tokenizer, prompts, **keywords)

    monkeypatch.setattr(evaluation, "generate_greedy", watching)
    text = json.dumps({"messages": [ASK, ANSWER], "functions": [TOOL["function"]]}) + "\n"
    called = commands("evaluate", text, "--max-new-tokens", 2)
    assert called.code == 0, called.err
    assert seen == ["<tool> clock <user> how is rain ? <bot>"]
    assert commands("cache", text).code == 0
    tokenizer = load_tokenizer(model)
    safety = SafetyTokens.load(model / "t.json", tokenizer).constraint(1.0)
    cache = ReferenceCache(tmp_path / "refs.safetensors", safety)
    whole = tokenizer(seen[0] + " sure <end>", add_special_tokens=False)["input_ids"]
    assert cache.lookup(torch.tensor([whole])).shape == (1, len(whole), 2)
    trained = commands("train", text, "--reference", tmp_path / "refs.safetensors")
    assert trained.code == 0, trained.err
    told = json.loads((tmp_path / "out" / "str_kernels.json").read_text())
    assert (told["data"]["tokens"], told["data"]["targets"]) == (len(whole), 2)


def test_long_prompts_by_an_option(commands, tmp_path):
    """Refused as long as nothing is said; left out by ``--long skip``, and cache names it next."""
    text = GOOD + "\n" + json.dumps({"prompt": "rain " * 90, "response": "sure"}) + "\n"
    for name in ("train", "cache"):
        refused = commands(name, text)
        assert refused.code == 2
        assert "1 of 2 prompts leave no room" in refused.err
        assert "--long skip" in refused.err
        taken = commands(name, text, "--long", "skip")
        assert taken.code == 0, taken.err
        assert "1 of 2 rows are left out" in taken.err
    assert "--long skip" in taken.err.splitlines()[-1]


@EVERY
def test_a_template_that_rewrites_prompts(commands, model, name):
    """Training and caching refuse it with advice; evaluation, which needs no labels, says so."""
    template = (model / "chat_template.jinja").read_text()
    rewriting = template.replace("{{ '<bot> ' if add_gen", "{{ '<bot> please ' if add_gen")
    (model / "chat_template.jinja").write_text(rewriting)
    try:
        called = commands(name, GOOD + "\n")
    finally:
        (model / "chat_template.jinja").write_text(template)
    assert called.code == (0 if name == "evaluate" else 2)
    assert "rewrites the prompt when an answer follows it" in called.err
    assert "it asks with 'please ' where it then writes 'sure <end> '" in called.err
    assert ("note: " in called.err) == (name == "evaluate")


def test_a_template_without_an_end_is_said_before_training(commands, model):
    """The notice comes before the first step."""
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<end>", "<pad>"))
    try:
        called = commands("train", GOOD + "\n")
    finally:
        (model / "chat_template.jinja").write_text(template)
    assert called.code == 0, called.err
    assert called.err.index("1 of 1 rows learn no end token") < called.err.index("training …")
