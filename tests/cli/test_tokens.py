"""tokens: from a model's folder to a file that training takes."""

import json

import pytest

from str_kernels import SafetyTokens
from str_kernels.evaluation.judge import is_refusal
from str_kernels.inputs.data import read_jsonl
from str_kernels.inputs.loading import load_tokenizer
from str_kernels.inputs.rows import prompt_messages, response_of
from str_kernels.safety import tokens as tokens_module
from tests.cli.calling import call
from tests.tiny import exchanges


@pytest.fixture
def files(tmp_path):
    """Requests as JSONL, and as plain lines."""
    refused = tmp_path / "refused.jsonl"
    rows = [{"prompt": q, "response": a} for q, a in exchanges(forbidden=True)[:12]]
    refused.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benign = tmp_path / "benign.txt"
    benign.write_text("\n".join(q for q, _ in exchanges(forbidden=False)[:12]) + "\n\n")
    return refused, benign


def test_tokens_are_found_shown_and_saved(capsys, aligned_model_dir, files, tmp_path):
    """A table on stdout, a file that this tokenizer accepts, the next command on stderr."""
    refused, benign = files
    out = tmp_path / "tokens.json"
    called = call(
        capsys, "tokens", aligned_model_dir, "--out", out, "--top-k", 10, "--prompts", refused,
        "--templates", refused, "--benign", benign,
    )  # fmt: skip
    assert called.code == 0, called.err
    saved = SafetyTokens.load(out, load_tokenizer(aligned_model_dir))
    assert {"I", "am", "sorry", "cannot"} <= set(saved.tokens)
    assert all(repr(text) in called.out for text in saved.tokens)
    assert f"--tokens {out}" in called.err.splitlines()[-1]
    assert "\r" not in called.err  # no bars where there is no terminal
    assert "%|" not in called.err


def test_json_is_the_saved_file(capsys, aligned_model_dir, files, tmp_path):
    """--json prints what was saved, and nothing else, on stdout."""
    out = tmp_path / "tokens.json"
    called = call(
        capsys, "tokens", aligned_model_dir, "--out", out, "--prompts", files[0], "--json"
    )
    printed = json.loads(called.out)
    assert printed.pop("path") == str(out)
    assert printed == json.loads(out.read_text())


@pytest.mark.parametrize("where", ["no/such/folder/t.json", "", "file/t.json"])
def test_an_unwritable_output_is_found_before_the_work(
    capsys, monkeypatch, aligned_model_dir, tmp_path, where
):
    """A missing folder, a folder's own name, a file in place of the folder: no model is loaded."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tokens_module.SafetyTokens, "identify", None)  # calling it would fail
    called = call(capsys, "tokens", aligned_model_dir, "--out", tmp_path / where)
    assert called.code == 2
    assert "error: out=" in called.err
    assert "reading" not in called.err


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{oops\n', "p.jsonl:2: not JSON"),
        ("p.jsonl", "", "p.jsonl: holds no rows"),
        ("p.txt", "\n \n", "p.txt: holds no text"),
        ("p.txt", None, "p.txt: no such file"),
    ],
)
def test_a_broken_prompt_file_is_named(capsys, tmp_path, name, text, rule):
    """File and line are named, before the model is looked for."""
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    called = call(
        capsys, "tokens", "./nowhere", "--prompts", path, "--out", tmp_path / "tokens.json"
    )
    assert called.code == 2
    assert rule in called.err


def test_it_says_first_how_often_the_model_refuses(capsys, aligned_model_dir, files, tmp_path):
    """Its own answers are judged before its tokens are looked for."""
    out = tmp_path / "tokens.json"
    called = call(capsys, "tokens", aligned_model_dir, "--out", out, "--prompts", files[0])
    told = f"refuses 12 of 12 requests of {files[0]}\n"
    assert told in called.err
    assert called.err.index(told) < called.err.index("identifying safety tokens")


def test_a_model_that_does_not_refuse_has_nothing_to_hold(capsys, tiny_model_dir, files, tmp_path):
    """It is said before anything else is, and the tokens are found all the same."""
    out = tmp_path / "tokens.json"
    called = call(capsys, "tokens", tiny_model_dir, "--out", out, "--prompts", files[0])
    assert called.code == 0, called.err
    assert f"refuses 0 of 12 requests of {files[0]}: there is nothing to hold" in called.err
    assert out.is_file()


def test_the_built_in_requests_are_named(capsys, tiny_model_dir, tmp_path):
    """Without --prompts."""
    called = call(capsys, "tokens", tiny_model_dir, "--out", tmp_path / "tokens.json")
    assert "refuses 0 of 20 built-in requests: there is nothing to hold" in called.err


def test_anchors_are_the_model_s_own_answers(capsys, aligned_model_dir, files, tmp_path):
    """Requests of lines and of JSONL, each with its answer, in files that training takes."""
    folder = tmp_path / "anchors"
    arguments = ("--out", tmp_path / "t.json", "--prompts", files[0], "--benign", files[1])
    called = call(capsys, "tokens", aligned_model_dir, *arguments, "--anchors", folder / "of")
    assert called.code == 2
    assert f"there is no folder {str(folder)!r}" in called.err
    called = call(capsys, "tokens", aligned_model_dir, *arguments, "--anchors", folder)
    assert called.code == 0, called.err
    made = [folder / "refused.jsonl", folder / "benign.jsonl"]
    assert all(f"--anchors {path}" in called.err.splitlines()[-1] for path in made)
    refused, benign = map(read_jsonl, made)
    assert [prompt_messages(row) for row in refused] == [
        prompt_messages(row) for row in read_jsonl(files[0])
    ]
    assert all(is_refusal(response_of(row)) for row in refused)
    assert len(benign) == 12
    assert not any(is_refusal(response_of(row)) for row in benign)
