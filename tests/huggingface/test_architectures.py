"""The patch changes the way to the loss, not the loss: every architecture against itself."""

from __future__ import annotations

import pytest
import torch

from str_kernels.huggingface import DeferredLogits, patch_model
from str_kernels.huggingface.deferred import recording
from tests.huggingface.models import (
    FP32,
    MODELS,
    assert_same,
    batch,
    build,
    loss_and_gradients,
    relative,
)


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_gradients_and_logits(name):
    """Loss and every gradient within rounding; logits, once read, bit for bit."""
    model, inputs = build(name), batch()
    want, logits = loss_and_gradients(model, **inputs), model(**inputs).logits
    with patch_model(model):
        assert_same(loss_and_gradients(model, **inputs), want)
        outputs = model(**inputs)
        assert isinstance(outputs.logits, DeferredLogits)
        assert not outputs.logits.is_materialised
        with pytest.warns(UserWarning, match="equal asked"):
            assert torch.equal(outputs.logits, logits)


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_untouched(name):
    """Greedy tokens and scores are those of the unpatched model, and nothing is deferred."""
    model, prompt = build(name).eval(), batch()["input_ids"][:1, :4]
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    arguments |= {"output_scores": True, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **arguments)
    with patch_model(model):
        got = model.generate(prompt, **arguments)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, want.scores, strict=True))
    assert not any(isinstance(x, DeferredLogits) for x in got.scores)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_a_dropped_scale_is_seen(name, monkeypatch):
    """The comparison above fails when the fold forgets a factor."""
    model, inputs = build(name), batch()
    want = loss_and_gradients(model, **inputs)
    monkeypatch.setattr(recording, "_times", lambda fold, other, divide: fold)
    with patch_model(model, verify=False), pytest.raises(AssertionError):
        assert_same(loss_and_gradients(model, **inputs), want)


def test_bfloat16_model():
    """A bf16 model: the fused loss is nearer to fp32 than the bf16 head's own."""
    exact, model, inputs = build().double(), build(dtype=torch.bfloat16), batch()
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(rounded)
    want = loss_and_gradients(model, **inputs)
    with patch_model(model):
        got = loss_and_gradients(model, **inputs)
    # both share the bf16 body; 2^-8 a logit of size 10 is the plain head's rounding
    assert relative(got["loss"].float(), want["loss"].float()) < 2**-8
    for name in want:
        assert relative(got[name].float(), want[name].float()) < 0.05, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_fused(mode):
    """With labels in eval mode the same loss comes out, without the logits being built."""
    model, inputs = build("gemma2").eval(), batch()
    with mode():
        want = model(**inputs).loss
    with patch_model(model), mode():
        outputs = model(**inputs)
        assert not outputs.logits.is_materialised
        assert relative(outputs.loss, want) < FP32


def test_number_of_items_and_shifted_labels():
    """``num_items_in_batch`` and ``shift_labels`` mean what they mean to transformers."""
    model, inputs = build(), batch()
    labels = torch.nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:].contiguous()
    arguments = {**inputs, "labels": labels, "shift_labels": labels, "num_items_in_batch": 7}
    want = loss_and_gradients(model, **arguments)
    with patch_model(model):
        assert_same(loss_and_gradients(model, **arguments), want)


def test_all_labels_ignored():
    """A batch without any label: a zero that is attached to the graph."""
    model, inputs = build(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with patch_model(model):
        found = loss_and_gradients(model, **inputs)
    assert found.pop("loss") == 0
    assert found
    assert all(not gradient.any() for gradient in found.values())
