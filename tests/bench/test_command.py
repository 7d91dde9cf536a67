"""`str-kernels bench` as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.cli.calling import call

QUICK = ("bench", "--quick", "--contenders", "ours,ours-str,transformers,cce,liger")


@pytest.fixture
def no_compiler(monkeypatch):
    """No C++ compiler: nothing is compiled for minutes."""
    monkeypatch.setattr("str_kernels.bench.contenders.shutil.which", lambda name: None)


@pytest.mark.usefixtures("no_compiler")
def test_a_quick_run(capsys, tmp_path):
    """A table of errors on stdout that ranks nothing, and who did not run and why."""
    called = call(capsys, *QUICK, "--out", tmp_path)
    assert called.code == 0, called.err
    assert "transformers" in called.out
    assert "not measured: cce" in called.err
    if not torch.cuda.is_available():
        assert "not measured: liger: needs a GPU" in called.err
    assert "next: str-kernels" in called.err
    assert "a quick run ranks nothing" in called.err
    heading = called.out.splitlines()[1:4]
    assert not any(word in line for line in heading for word in (" ms ", "MiB", "product"))
    assert [path.name for path in tmp_path.iterdir()] == ["quick.jsonl"]
    called = call(capsys, *QUICK, "--out", tmp_path, "--json")  # all of it is there already
    found = json.loads(called.out)
    assert found["schema"] == "str_kernels.bench/1"
    rows = {row["contender"]: row for row in found["rows"]}
    assert rows["ours"]["gemms"] > 0
    assert rows["ours"]["hidden_error"] < 0.01
    assert rows["ours-str"]["constraint_error"] < 1e-4
    assert rows["transformers"]["peak_bytes"] > 2 * 256 * 8192 * 4


@pytest.mark.usefixtures("no_compiler")
def test_a_model_s_own_head(capsys, tmp_path, tiny_model_dir):
    """With a model its hidden states are measured, on prose unless there is data."""
    arguments = ("--model", tiny_model_dir, "--contenders", "ours-exact", "--trainable", "--json")
    called = call(capsys, "bench", "--quick", *arguments, "--out", tmp_path)
    assert called.code == 0, called.err
    rows = {row["contender"]: row for row in json.loads(called.out)["rows"]}
    assert rows["ours-exact"]["N"] == 256
    assert rows["ours-exact"]["weight_error"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "dtype='int8': must be one of float32, bfloat16, float16."),
        (("--shape", "1024"), "shape='1024': must be three numbers above 1, N,V,D"),
        (("--shape", "9,9,0"), "shape='9,9,0'"),
        (("--model", "m", "--shape", "2,2,2"), "give --model or --shape"),
        (("--data", "d.jsonl"), "needs a model to read it"),
        (("--contenders", "nobody"), "contenders='nobody': must be of ours, ours-str"),
        (("--quick", "--model", "gpt2", "--data", "no.jsonl"), "data='no.jsonl': no such file."),
    ],
)
def test_a_wrong_command_is_one_message(capsys, tmp_path, arguments, message):
    """Said by name, before anything slow, without a trace."""
    called = call(capsys, "bench", *arguments, "--out", tmp_path / "out")
    assert called.code == 2
    assert message in called.err
    assert "Traceback" not in called.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_compiler")
def test_a_run_tells_milliseconds_and_in_a_footnote_products(capsys, tmp_path):
    """The table has ms and MiB; the folder has JSON Lines, Markdown and a picture."""
    arguments = ("--shape", "64,4096,32", "--contenders", "ours,transformers", "--out", tmp_path)
    called = call(capsys, "bench", *arguments)
    assert called.code == 0, called.err
    assert " ms " in called.out
    assert "MiB" in called.out
    assert "× the bare product of hidden states and head: ours " in called.err
    table = (tmp_path / "bench.md").read_text()
    assert "| contender | ms | MiB |" in table
    assert "× the bare product of hidden states and head: ours " in table
    assert (tmp_path / "bench-synthetic-float32.png").read_bytes().startswith(b"\x89PNG")
