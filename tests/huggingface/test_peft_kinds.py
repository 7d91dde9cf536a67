"""Other adapters than LoRA, several at once, and what PEFT does to a model after the patch."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from str_kernels.huggingface import DeferredLogits, patch_model
from tests.huggingface.adapters import BODY, SAFETY, wrap
from tests.huggingface.dense import constant_cache, dense_loss
from tests.huggingface.models import (
    assert_same,
    batch,
    build,
    gradients,
    loss_and_gradients,
    relative,
)


def ia3():
    """IA³ away from its start, where it multiplies by 1."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(build(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    return model


def prompts():
    torch.manual_seed(2)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    return get_peft_model(build(), config)


@pytest.mark.parametrize("make", [ia3, prompts])
def test_loss_and_gradients(make):
    """Without a constraint: loss and gradients of the unpatched model, fused."""
    model, inputs = make(), batch()
    want = loss_and_gradients(model, **inputs)
    with patch_model(model) as patch:
        assert_same(loss_and_gradients(model, **inputs), want)
        assert patch.last_parts is not None


def test_ia3_with_a_constraint():
    """The reference is the model without its IA³ vectors."""
    model, inputs = ia3(), batch()
    want = gradients(model, dense_loss(model, inputs, SAFETY, "all"))
    with patch_model(model, SAFETY):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_prompts_with_a_constraint(tmp_path):
    """Soft prompts cannot be switched off below: a cache has no row of them: refused."""
    model, inputs = prompts(), batch()
    with patch_model(model, SAFETY), pytest.raises(ValueError, match="no adapter to switch off"):
        model(**inputs)
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, torch.zeros(len(SAFETY.token_ids)))
    with patch_model(model, SAFETY, reference=cache), pytest.raises(ValueError, match="input_ids:"):
        model(**inputs)


def two_adapters():
    model = wrap(build())
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=2, target_modules=BODY, init_lora_weights=False))
    return model


@pytest.mark.parametrize("order", ["other", "default", "both"])
def test_switching_adapters_after_the_patch(order):
    """Whichever is active trains, and all are off in the reference."""
    model, inputs = two_adapters(), batch()
    patch = patch_model(model, SAFETY)
    for name in {"other": ["other"], "default": ["other", "default"], "both": []}[order]:
        model.set_adapter(name)
        model(**inputs)
    if order == "both":
        model.base_model.set_adapter(["default", "other"])
    got = gradients(model, model(**inputs).loss)
    patch.unpatch()
    want = gradients(model, dense_loss(model, inputs, SAFETY, "all"))
    assert_same(got, want, 2e-5)
    trained = {n.split(".weight")[0].rsplit(".", 1)[-1] for n in got if "lora_" in n}
    assert trained == ({"default", "other"} if order == "both" else {order})


def test_deleted_and_new_adapters():
    """An adapter that comes, and one that goes, after the patch."""
    model, inputs = two_adapters(), batch()
    with patch_model(model, SAFETY):
        model(**inputs)
        model.delete_adapter("default")
        model.set_adapter("other")
        got = gradients(model, model(**inputs).loss)
    assert_same(got, gradients(model, dense_loss(model, inputs, SAFETY, "all")), 2e-5)


def test_merging_after_the_patch():
    """``merge_and_unload``: the merged model is fused, and a constraint then has no reference."""
    model, inputs = wrap(build()), batch()
    with torch.no_grad():
        want = model(**inputs).loss
    patch_model(model, SAFETY)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="no adapter to switch off"):
        merged(**inputs)
    again = get_peft_model(merged, LoraConfig(target_modules=BODY))  # a second round, still patched
    outputs = again(**inputs)
    assert isinstance(outputs.logits, DeferredLogits)
    assert relative(outputs.loss, want) < 1e-5
    assert outputs.loss.requires_grad


@pytest.mark.parametrize("words", [100, 80])
def test_resizing_after_the_patch(words):
    """More rows or fewer: the new head is used; token ids that it has lost are refused."""
    model, inputs = wrap(build()), batch()
    inputs = {k: x.clamp(max=words - 1) for k, x in inputs.items()}
    with patch_model(model, SAFETY):
        model(**inputs)
        model.base_model.model.resize_token_embeddings(words, mean_resizing=False)
        if words < max(SAFETY.token_ids):
            with pytest.raises(ValueError, match="95"):
                model(**inputs)
            return
        got = gradients(model, model(**inputs).loss)
    assert_same(got, gradients(model, dense_loss(model, inputs, SAFETY, "all")), 2e-5)


class Int8Linear(nn.Linear):
    """A layer as bitsandbytes has them: whole numbers and a scale, made real in the forward."""

    @classmethod
    def quantise(cls, layer: nn.Linear) -> Int8Linear:
        made = cls(layer.in_features, layer.out_features, bias=False)
        made.step = (layer.weight.detach().abs().max() / 127).item()
        whole = (layer.weight.detach() / made.step).round().to(torch.int8)
        made.weight = nn.Parameter(whole, requires_grad=False)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


def test_a_quantised_body():
    """LoRA on int8 layers: loss and gradients of both terms, and the trial passes."""
    base = build()
    for layer in base.model.layers:
        layer.self_attn.q_proj = Int8Linear.quantise(layer.self_attn.q_proj)
        layer.mlp.down_proj = Int8Linear.quantise(layer.mlp.down_proj)
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=BODY, init_lora_weights=False))
    inputs = batch()
    want = gradients(model, dense_loss(model, inputs, SAFETY, "all"))
    with patch_model(model, SAFETY) as patch:
        assert patch.verification.fused
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_a_quantised_head_is_refused():
    """By name, with what to do."""
    model = build()
    model.lm_head = Int8Linear.quantise(model.lm_head)
    with pytest.raises(ValueError, match="keep the head unquantised"):
        patch_model(model)
