"""The constraint on PEFT models, against a computation by hand with materialised logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from str_kernels import SafetyConstraint
from str_kernels.huggingface import patch_model, unpatch_model
from tests.huggingface.adapters import TOKENS, constraint, lora
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import assert_same, batch, build, gradients


@pytest.mark.parametrize(
    ("name", "kind", "positions"),
    [
        ("llama", "mse", "all"),
        ("llama", "mse", "labels"),
        ("llama", "logprob", 2),
        ("llama", "kl", "all"),
        ("gemma2", "mse", 2),  # softcap: the penalty's gradient has the derivative of it
        ("gemma2", "logprob", "all"),
        ("llama", "kl_mass", "all"),
        ("gemma2", "kl_mass", 2),
        ("cohere", "kl", "labels"),  # scale
        ("gpt2", "mse", "all"),  # tied
        ("mixtral", "mse", "all"),
    ],
)
def test_against_dense(name, kind, positions):
    """Loss and every adapter gradient are those of the materialised formula."""
    model, inputs, safety = lora(name), batch(), constraint(kind)
    auxiliary = 0.0
    if name == "mixtral":  # the router's loss is the model's own affair
        model.config.router_aux_loss_coef = model.base_model.model.router_aux_loss_coef = 0.0
    want = gradients(model, dense_loss(model, inputs, safety, positions) + auxiliary)
    with patch_model(model, safety, positions=positions):
        got = gradients(model, model(**inputs).loss)
    assert_same(got, want, 2e-5)  # the penalty squares a difference of logits that nearly cancel


def test_an_untouched_adapter_costs_nothing():
    """While the adapter is zero the penalty is exactly zero, in bf16 autocast too."""
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    patch = patch_model(model, constraint())
    model(**batch())
    assert patch.last_parts.penalty == 0
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
    assert patch.last_parts.penalty == 0


@pytest.mark.parametrize("how", ["cache", "no cache", "checkpointed"])
def test_the_reference_attends_as_the_model_does(how):
    """Packed rows: whether transformers sees the packing or not, both passes see the same."""
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    inputs = {k: x.reshape(1, -1) for k, x in batch().items() if k != "attention_mask"}
    inputs["position_ids"] = torch.arange(11).repeat(3)[None]
    if how == "checkpointed":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif how == "no cache":
        inputs["use_cache"] = False
    with patch_model(model, constraint()) as patch:
        model(**inputs)
        assert patch.last_parts.penalty == 0


def test_one_denominator():
    """``num_items_in_batch`` divides both terms; 1 × 4 rows = 2 × 2 = 4 × 1, gradients too."""
    model, inputs, safety = lora(), batch(rows=4), constraint()
    items = int((inputs["labels"][:, 1:] != -100).sum())
    want = gradients(model, dense_loss(model, inputs, safety, "all"))
    patch_model(model, safety)
    for rows in (4, 2, 1):
        loss = torch.zeros(())
        for start in range(0, 4, rows):
            part = {name: x[start : start + rows] for name, x in inputs.items()}
            step = model(**part, num_items_in_batch=items).loss
            step.backward()
            loss = loss + step.detach()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        assert_same({"loss": loss, **found}, want, 2e-5)
    unpatch_model(model)


def test_a_wrong_token_is_seen():
    """The comparison fails when one safety token is another."""
    model, inputs, safety = lora(), batch(), constraint()
    want = gradients(model, dense_loss(model, inputs, safety, "all"))
    with patch_model(model, SafetyConstraint([4, *TOKENS[1:]], 0.5)), pytest.raises(AssertionError):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_without_adapter():
    """No adapter, or a merged one: refused at the first step, for PEFT may come after the patch."""
    model = build()
    with patch_model(model, constraint()):
        with pytest.raises(ValueError, match="has no adapter to switch off"):
            model(**batch())
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        assert wrapped(**batch()).loss.requires_grad
        wrapped.merge_adapter()
        with pytest.raises(ValueError, match="merged into the weights"):
            wrapped(**batch())
