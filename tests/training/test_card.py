"""The adapter's card says what was held, how it was trained, and what was measured."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from str_kernels.training.checks import prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings
from tests.tiny import exchanges


@pytest.fixture
def trained(tiny_model_dir, tmp_path):
    """Train for two steps; return the card and the result."""
    rows = [{"prompt": q, "response": a} for q, a in exchanges(forbidden=False)[:8]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**changes):
        out = tmp_path / "out"
        settings = {"steps": 2, "batch": 2, "rank": 4, "top_k": 4, "max_length": 64, **changes}
        if settings.pop("anchored", False):
            settings["anchors"] = [str(data)]
        made = TrainSettings(str(tiny_model_dir), str(data), str(out), **settings)
        return train(prepare(made)), ModelCard.load(out / "README.md")

    return run


def test_it_says_what_was_held(trained, tmp_path):
    """Tokens, kind, strength, positions, reference; the figures of the result; PEFT's metadata."""
    result, card = trained(kind="mse", positions=3)
    tokens = json.loads((tmp_path / "out/safety_tokens.json").read_text())["tokens"]
    assert "4 safety tokens" in card.text
    assert all(repr(token) in card.text for token in tokens)
    assert "the first 3 positions of each response" in card.text
    assert "kind `mse`, strength 0.1, reference `adapter_off`" in card.text
    assert f"{result.cross_entropy:.4f} nats a token" in card.text
    assert f"{result.safety_penalty:.4f} nats a token" in card.text
    assert "8 rows" in card.text
    assert card.data.library_name == "peft"
    assert "str-kernels" in card.data.tags
    assert "[More Information Needed]" not in card.text


def test_anchors_and_temperature_are_told(trained):
    """What goes beyond the defaults."""
    _, card = trained(temperature=2.0, anchored=True)
    assert "strength 10, temperature 2" in card.text
    assert "Anchor rows (8) were held and not learned." in card.text


def test_nothing_held_is_said(trained):
    """Without a constraint, and with the model's own head."""
    _, card = trained(method="plain")
    assert "Nothing: it was trained without a safety constraint." in card.text
    assert "penalty" not in card.text
