"""A filtered head trains the same model, by a measure that finds a filter that does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import equivalence
from benchmarks.equivalence import (
    HEADS,
    LIMIT,
    RATES,
    batches,
    new_model,
    share_of_spread,
    synthetic_tokens,
    train,
    with_lora,
    word_tokens,
)
from str_kernels.engine import finish

STEPS = 24
FAULT = HEADS["fault: ε 0.3"]


@pytest.fixture(scope="module")
def text():
    """Both texts, fewer steps than the benchmark's."""
    return batches(synthetic_tokens(STEPS), STEPS)


@pytest.fixture(scope="module")
def full(text):
    """Models of two seeds trained with a materialised head, and their curves."""
    models = [new_model(seed) for seed in range(2)]
    curves = [train(model, text[0], None, RATES["full"])[0] for model in models]
    return models, torch.tensor(curves)


@pytest.fixture(scope="module")
def lora(text, full):
    """The curves of adapters on those models with a materialised head."""
    return torch.tensor(
        [
            train(with_lora(model, seed), text[1], None, RATES["lora"])[0]
            for seed, model in enumerate(full[0])
        ]
    )


def curves(text, models, settings) -> tuple[torch.Tensor, float]:
    """Of both seeds: all weights from random ones, or LoRA on ``models``; and the live share."""
    kind = "full" if models is None else "lora"
    found, live = [], []
    for seed in range(2):
        model = new_model(seed) if models is None else with_lora(models[seed], seed)
        losses, share = train(model, text[int(kind == "lora")], settings, RATES[kind])
        found.append(losses)
        live.append(share)
    return torch.tensor(found), sum(live) / 2


@pytest.mark.slow
@pytest.mark.parametrize("head", ["exact", "filtered", "screened"])
def test_from_random_weights(text, full, head):
    """All weights, a flat softmax: curves within a tenth of the distance between seeds."""
    mine, live = curves(text, None, HEADS[head])
    assert share_of_spread(mine, full[1]) < LIMIT
    assert (live < 1) == (head != "exact")  # or nothing would have been put to the test


@pytest.mark.slow
@pytest.mark.parametrize("head", ["exact", "filtered"])
def test_with_lora(text, full, lora, head):
    """A frozen head under adapters: the same."""
    assert share_of_spread(curves(text, full[0], HEADS[head])[0], lora) < LIMIT


def test_a_filter_too_coarse_is_found(text, full):
    """ε = 0.3, one tile of 64 live: the measure that passes the filter refuses this one."""
    assert share_of_spread(curves(text, None, FAULT)[0], full[1]) > LIMIT


@pytest.mark.slow
def test_dropped_dead_pairs_are_found(text, full, monkeypatch):
    """With the dead pairs' mass and mean rows left out of the gradient, the same coarse filter's
    curves are further off still.
    """
    with_dead = share_of_spread(curves(text, None, FAULT)[0], full[1])
    monkeypatch.setattr(
        finish, "dead_product", lambda left, right, _: torch.zeros(len(left), right.shape[1])
    )
    assert share_of_spread(curves(text, None, FAULT)[0], full[1]) > max(LIMIT, with_dead)


def test_the_measure():
    """Distances in units of the seeds' own: a curve's own is 0, another seed's is √2."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 2000, generator=g)
    assert share_of_spread(truth, truth) == 0
    assert share_of_spread(truth.roll(1, 0), truth) == pytest.approx(2**0.5, rel=0.05)
    off = truth + 0.2 * torch.randn(3, 2000, generator=g)
    assert share_of_spread(off, truth) == pytest.approx(0.2, rel=0.05)


def test_words_of_a_text(tmp_path):
    """The most frequent word is 0; what is too rare shares the last number."""
    path = tmp_path / "text.txt"
    path.write_text("b a a c a b " + " ".join(f"w{i}" for i in range(equivalence.VOCAB)))
    tokens = word_tokens(path)
    assert tokens[:6].tolist() == [1, 0, 0, 2, 0, 1]
    assert tokens.max() == equivalence.VOCAB - 1
