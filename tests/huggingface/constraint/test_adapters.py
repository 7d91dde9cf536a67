"""Which adapters are part of the reference, and a first penalty that is not 0."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model

from str_kernels.huggingface import build_reference_cache, patch_model
from tests.huggingface.adapters import BODY, SAFETY
from tests.huggingface.dense import dense_loss, safety_values
from tests.huggingface.models import assert_same, batch, build, gradients

pytestmark = pytest.mark.one_in(2)

KINDS = {
    "lora": LoraConfig(r=4, target_modules=BODY),
    "dora": LoraConfig(r=4, target_modules=BODY, use_dora=True),
    "elsewhere": LoraConfig(r=4, target_modules=["k_proj", "up_proj"]),
    "whole head": LoraConfig(r=4, target_modules=BODY, modules_to_save=["lm_head"]),
    "lora on the head": LoraConfig(r=4, target_modules=[*BODY, "lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=BODY, trainable_token_indices=[3, 5, 17]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def move(model, name: str) -> None:
    """Every parameter of this adapter, away from its start."""
    torch.manual_seed(len(name))
    for path, parameter in model.named_parameters():
        if name in path.split("."):
            parameter.data.add_(torch.randn_like(parameter) / 8)


def aligned(kind: str):
    """A model whose one adapter carries the alignment, frozen."""
    torch.manual_seed(0)
    model = get_peft_model(build(), KINDS[kind], adapter_name="aligned")
    move(model, "aligned")
    return model.requires_grad_(False).train()


def with_task(kind: str, task: str):
    """The same with another adapter beside it, active and trained."""
    model = aligned(kind)
    torch.manual_seed(1)
    model.add_adapter("task", KINDS[task])
    model.base_model.set_adapter(["aligned", "task"])
    model.set_requires_grad("aligned", False)
    move(model, "task")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("task" in name for name in trained)
    return model


def reference(kind: str, inputs) -> torch.Tensor:
    """Safety logits of the model that has the frozen adapter alone."""
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return safety_values(aligned(kind)(**arguments).logits, SAFETY)


PAIRS = [
    ("lora", "lora"), ("dora", "lora"), ("lora", "dora"), ("elsewhere", "lora"),
    ("whole head", "elsewhere"), ("elsewhere", "whole head"), ("lora on the head", "lora"),
    ("lora", "lora on the head"), ("tokens", "lora"), ("lora", "tokens"), ("ia3", "ia3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "task"), PAIRS, ids=map(" under ".join, PAIRS))
def test_a_frozen_adapter_stays_in_the_reference(kind, task):
    """The penalty is the distance from the model with that adapter alone; all flags come back."""
    inputs = batch()
    want_model, model = with_task(kind, task), with_task(kind, task)
    want = gradients(
        want_model, dense_loss(want_model, inputs, SAFETY, "all", reference=reference(kind, inputs))
    )
    with patch_model(model, SAFETY):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)
        assert model.active_adapters == ["aligned", "task"]
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_adapters_of_two_kinds():
    """PEFT's mixed model: LoHa carries the alignment, LoRA is trained."""

    def mixed() -> PeftMixedModel:
        config = LoHaConfig(r=4, target_modules=["q_proj", "up_proj"])
        torch.manual_seed(0)
        model = get_peft_model(build(), config, adapter_name="aligned", mixed=True)
        move(model, "aligned")
        return model.requires_grad_(False).train()

    inputs = batch()
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        r = safety_values(mixed()(**arguments).logits, SAFETY)
    model = mixed()
    model.add_adapter("task", KINDS["lora"])
    model.set_adapter(["aligned", "task"])
    move(model, "task")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("task" in name)
    want = gradients(model, dense_loss(model, inputs, SAFETY, "all", reference=r))
    with patch_model(model, SAFETY):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_a_cache_has_the_same_reference(tmp_path):
    """What is written beforehand is what the pass computes."""
    inputs, model = batch(), with_task("lora", "elsewhere")
    path = tmp_path / "references.safetensors"
    build_reference_cache(model, [inputs], path, SAFETY)
    want = dense_loss(model, inputs, SAFETY, "all", reference=reference("lora", inputs))
    with patch_model(model, SAFETY, reference=path):
        # fp16 references: 2^-11 of logits of about 8, in a squared difference of about 1
        assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=2e-3)


def test_without_a_trained_adapter_all_are_off():
    """A loaded adapter is judged against the model without it, as it was before."""
    inputs, model = batch(), aligned("lora")
    want = dense_loss(model, inputs, SAFETY, "all")
    with patch_model(model, SAFETY) as patch:
        got = model(**inputs).loss
    assert patch.last_parts.penalty > 0
    assert got.item() == pytest.approx(want.item(), rel=2e-5)


def said(model, *batches, **settings) -> list[str]:
    with patch_model(model, SAFETY, **settings), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs in batches:
            model(**inputs).loss.backward()
    return [str(w.message) for w in caught if "first safety penalty" in str(w.message)]


def saved(folder) -> str:
    model = get_peft_model(build(), KINDS["lora"])
    move(model, "default")
    model.save_pretrained(folder)
    return str(folder)


def test_going_on_with_a_loaded_adapter_is_said(tmp_path):
    """Once, with the penalty's value and what to do; the penalty is against the model without."""
    model = PeftModel.from_pretrained(build(), saved(tmp_path), is_trainable=True).train()
    inputs = batch()
    with torch.no_grad():
        plain = model(**inputs).loss
        penalty = (dense_loss(model, inputs, SAFETY, "all") - plain).item()
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    messages = said(model, nothing, inputs, batch(seed=7))
    assert len(messages) == 1
    assert float(messages[0].split(" is ")[1].split(" a token")[0]) == pytest.approx(penalty, 0.01)
    assert "is_trainable=False" in messages[0]
    assert "merge_and_unload" in messages[0]


@pytest.mark.parametrize("kind", ["lora", "dora", "whole head", "ia3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_says_nothing(kind, dtype):
    """At its start the model is its reference, and later losses are no first ones."""
    model = get_peft_model(build(dtype=dtype), KINDS[kind]).train()
    assert said(model, batch()) == []
    with patch_model(model, SAFETY), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch()).loss.backward()
        move(model, "default")
        model(**batch()).loss.backward()


def test_a_frozen_adapter_says_nothing(tmp_path):
    """With the alignment in a frozen adapter and a new one beside it the penalty begins at 0."""
    model = PeftModel.from_pretrained(build(), saved(tmp_path)).train()
    model.add_adapter("task", KINDS["lora"])
    model.base_model.set_adapter(["default", "task"])
    model.set_requires_grad("default", False)
    assert said(model, batch()) == []


def test_a_cache_of_another_model_is_said(tmp_path):
    """The message names the cache."""
    path, inputs = tmp_path / "references.safetensors", batch()
    model = get_peft_model(build(), KINDS["lora"]).train()
    build_reference_cache(model, [inputs], path, SAFETY)
    assert said(model, inputs, reference=path) == []
    build_reference_cache(build(seed=3), [inputs], path, SAFETY)
    messages = said(model, inputs, reference=path)
    assert len(messages) == 1
    assert "cache file was made from another model" in messages[0]
