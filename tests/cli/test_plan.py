"""`str-kernels plan`: its tables, its JSON, its picture and its errors."""

from __future__ import annotations

import json

import pytest

from tests.cli.calling import call

CONFIG = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}


@pytest.fixture
def config(tmp_path):
    """The path of a tiny configuration."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


def test_plan_prints_tables_bars_and_a_verdict(capsys, config, tmp_path, monkeypatch):
    """Consumers, levers, the longest context, what is not known, and the next command."""
    monkeypatch.setenv("COLUMNS", "200")
    png = tmp_path / "plan.png"
    sizes = ("--context", 512, "--memory", 1, "--device", "cpu", "--rank", 2)
    called = call(capsys, "plan", config, *sizes, "--png", png)
    assert called.code == 0, called.err
    for word in ("fused head + checkpoints", "weights", "1,024 (all positions)", "█"):
        assert word in called.out
    assert "512 tokens fit 1 GiB with: none" in called.out
    assert "operations of a step in the reference pass, 512 tokens: " in called.out
    assert "% with --share 0.25" in called.out
    assert "not known: " in called.err
    assert "next: str-kernels train" in called.err
    assert png.read_bytes().startswith(b"\x89PNG")


def test_plan_checks_one_set_and_prints_json(capsys, config):
    """One set of levers by options, two measured steps, and a schema."""
    sizes = ("--context", 64, "--device", "cpu", "--rank", 2, "--safety-tokens", 4)
    called = call(capsys, "plan", config, *sizes, "--gradient-checkpointing", "--check", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found["schema"] == "str_kernels.plan/1"
    (row,) = found["rows"]
    assert row["levers"]["fused_head"]
    assert row["levers"]["gradient_checkpointing"]
    assert sum(row["owners"].values()) == row["bytes"]
    (check,) = found["checks"]
    assert check["ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--context", 2048), "context=2048"),
        (("--memory", 0.00001), "memory=1e-05"),
        (("--dtype", "fp4"), "dtype='fp4'"),
        (("--offload", "cpu"), "offload='cpu'"),
        (("--offload", "cpu", "--gradient-checkpointing", "--device", "cpu"), "offload='cpu'"),
        (("--png", "no/such/folder.png"), "png="),
        (("--dtype", "nf4", "--context", 64, "--own-head", "--check"), "dtype='nf4'"),
    ],
)
def test_plan_refuses_in_one_sentence(capsys, config, given, told):
    """Exit code 2, nothing on stdout, and the value by name."""
    called = call(capsys, "plan", config, *given)
    assert called.code == 2
    assert not called.out
    assert f"error: {told}" in called.err


def test_plan_of_no_model(capsys):
    """A name that is neither a folder nor on the Hub."""
    called = call(capsys, "plan", "no-such-model")
    assert called.code == 2
    assert "model='no-such-model'" in called.err
