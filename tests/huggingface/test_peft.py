"""PEFT in its variations: the fused loss is the model's own, and no adapter is left out."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from peft import LoraConfig

from str_kernels import SafetyConstraint
from str_kernels.huggingface import DeferredLogits, patch_model
from str_kernels.huggingface.constraint.adapters import adapters_off, trainable_base
from str_kernels.huggingface.constraint.reference_pass import reference_fold, safety_reference
from str_kernels.huggingface.deferred.forward import inner_forward
from str_kernels.options import LossOptions
from tests.huggingface.adapters import BODY, SAFETY, VARIANTS, wrap
from tests.huggingface.dense import constant_cache, dense_loss
from tests.huggingface.models import assert_same, batch, build, gradients, loss_and_gradients

pytestmark = pytest.mark.one_in(2)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("order", ["patch first", "peft first"])
def test_loss_and_gradients(name, order):
    """Without a constraint: every gradient of the unpatched model, whichever came first."""
    inputs = batch()
    unpatched = wrap(build(), **VARIANTS[name])
    torch.manual_seed(4)
    want = loss_and_gradients(unpatched, **inputs)
    model = build()
    if order == "patch first":
        patch = patch_model(model)
        model = wrap(model, **VARIANTS[name])
    else:
        model = wrap(model, **VARIANTS[name])
        patch = patch_model(model)
    torch.manual_seed(4)
    assert_same(loss_and_gradients(model, **inputs), want)
    assert patch.last_parts is not None
    assert not model(**inputs).logits.is_materialised


@pytest.mark.parametrize("name", ["whole head", "lora on the head", "dora", "dora on the head"])
@pytest.mark.parametrize("kind", ["mse", "logprob", "kl_mass"])
def test_constraint(name, kind):
    """The reference is the model without any of its adapters, those on the head included."""
    model, inputs = wrap(build(), **VARIANTS[name]), batch()
    safety = SafetyConstraint(SAFETY.token_ids, 0.5, kind=kind)
    want = gradients(model, dense_loss(model, inputs, safety, "all"))
    with patch_model(model, safety):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_reference_has_no_dropout_and_no_draws():
    """The reference is evaluated, the training pass draws what it would have drawn unpatched."""
    settings = {"lora_dropout": 0.5}
    model, inputs = wrap(build(), **settings), batch()
    torch.manual_seed(4)
    plain = model(**inputs).loss
    patch = patch_model(model, SAFETY)
    torch.manual_seed(4)
    model(**inputs)
    assert patch.last_parts.cross_entropy.item() == pytest.approx(plain.item(), rel=1e-6)
    assert model.training
    assert all(module.training for module in model.modules())


def test_flags_are_put_back():
    """Frozen adapters stay frozen, disabled ones disabled, after an error too."""
    model = wrap(build())
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with patch_model(model, SAFETY):
        loss_and_gradients(model, **batch())
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters is False


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Checkpointed layers: the same loss and gradients, the penalty in them."""
    model, inputs = wrap(build()), batch()
    want = gradients(model, dense_loss(model, inputs, SAFETY, "all"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with patch_model(model, SAFETY):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


def test_autocast_does_not_lose_gradients():
    """A reference pass under autocast leaves no graphless copy of a trained weight behind."""
    model, inputs = wrap(build(), modules_to_save=["lm_head", "norm"]), batch()
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, dense_loss(model, inputs, SAFETY, "all"))
    with patch_model(model, SAFETY), torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, model(**inputs).loss)
    # the same bf16 body; the dense head rounds its logits and their gradient to bf16 as well
    assert_same(got, want, 0.05)


@pytest.mark.parametrize("part", ["norm", "embed_tokens", "all"])
def test_a_trained_base_is_refused(part, tmp_path):
    """Parameters outside the adapters would move the reference: named, whenever they are thawed;
    frozen again, or held to a reference that does not move, they train.
    """
    model, inputs = wrap(build()), batch()
    body = model.base_model.model.model
    thawed = model if part == "all" else getattr(body, part)
    with patch_model(model, SAFETY):
        model(**inputs)
        thawed.requires_grad_()
        name = r"and \d+ more" if part == "all" else rf"trained \(model\.{part}\.weight\)"
        with pytest.raises(ValueError, match=rf"{name}.*freeze them.*cache file"):
            model(**inputs)
        thawed.requires_grad_(False)
        model(**inputs)
    thawed.requires_grad_()
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, torch.zeros(len(SAFETY.token_ids)))
    with patch_model(model, SAFETY, reference=cache):
        model(**inputs).loss.backward()
    with patch_model(model):
        model(**inputs).loss.backward()


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # whose head is tied
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        pytest.param(
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            marks=pytest.mark.skipif(
                "ensure_weight_tying" not in inspect.signature(LoraConfig).parameters,
                reason="PEFT 0.18 brings ensure_weight_tying",
            ),
        ),
        {"trainable_token_indices": [3, 5, 17]},
        {"target_modules": [*BODY, "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_the_reference_of_trained_copies_is_the_untouched_model(settings, name):
    """Copies that PEFT trains leave their originals alone: after steps that move every one of
    them, the reference is bit for bit that of the model before PEFT touched it.
    """
    untouched, inputs = build(name), batch()
    model = wrap(copy.deepcopy(untouched), **settings)
    assert trainable_base(model) == []
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = LossOptions(safety=SAFETY)
    everywhere = inputs["attention_mask"].reshape(-1) == 1
    with patch_model(model, SAFETY) as patch, patch_model(untouched) as base:
        for _ in range(2):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = dict(model.named_parameters())
        assert all((after[n] - old).abs().max() > 0.05 for n, old in before.items())
        got, want = (
            safety_reference(
                reference_fold(p.model, inner_forward(p.model), inputs, adapters=adapters),
                everywhere,
                options,
            )
            for p, adapters in ((patch, True), (base, False))
        )
    assert torch.equal(got[everywhere], want[everywhere])


def test_unloaded_and_merged():
    """``merge_and_unload`` leaves a patched model without adapters: right, unconstrained only."""
    model, inputs = wrap(build()), batch()
    with patch_model(model):
        merged = model.merge_and_unload()
        merged.requires_grad_()
        assert isinstance(merged(**inputs).logits, DeferredLogits)
        got = loss_and_gradients(merged, **inputs)
    assert_same(got, loss_and_gradients(merged, **inputs))
