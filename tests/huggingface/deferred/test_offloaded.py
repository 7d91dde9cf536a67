"""Heads whose weight accelerate loads for each call (``AlignDevicesHook``), from CPU or disk."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.multiprocessing.reductions import StorageWeakRef

from str_kernels import patch_model
from tests.huggingface.adapters import VARIANTS, constraint, wrap
from tests.huggingface.models import assert_same, batch, build, gradients


class Elsewhere(Mapping):
    """The weights of a module as on another device: each look gives a new copy."""

    def __init__(self, module):
        self._values = {n: x.detach().clone() for n, x in module.named_parameters()}
        self.copies = []

    def __getitem__(self, name):
        copy = self._values[name].clone()
        self.copies.append(StorageWeakRef(copy.untyped_storage()))
        return copy

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    @property
    def alive(self):
        """How many copies somebody still has."""
        return sum(not copy.expired() for copy in self.copies)


def offload(model):
    """Offload the head alone, or the base's below an adapter."""
    head = model.get_output_embeddings()
    head = getattr(head, "original_module", getattr(head, "base_layer", head))
    weights = Elsewhere(head)
    add_hook_to_module(head, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    assert head.weight.is_meta
    return weights


@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("kind", [None, "kl", "logprob"])
def test_an_offloaded_head(kind, patched):
    """The numbers of a head that is there; a load for each pass, and none alive in backward."""
    safety, inputs = None if kind is None else constraint(kind), batch()
    model = wrap(build())
    with patch_model(model, safety):
        want = gradients(model, model(**inputs).loss)
    model = wrap(build())
    if patched == "before":
        patch = patch_model(model, safety)
    weights = offload(model)
    if patched == "after":
        patch = patch_model(model, safety)
    outputs = model(**inputs)
    assert patch.last_parts is not None
    assert len(weights.copies) == (1 if safety is None else 2)
    assert weights.alive == 0
    assert_same(gradients(model, outputs.loss), want)
    assert len(weights.copies) <= 2


def test_a_copy_of_the_reference_pass_is_gone_before_the_next():
    """Two copies of the head would cost more than they save."""
    model, alive = wrap(build()), []
    patch_model(model, constraint("mse"))
    weights = offload(model)
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: alive.append(weights.alive))
    model(**batch())
    assert alive == [0, 0]


@pytest.mark.parametrize("variant", ["whole head", "lora on the head"])
def test_an_adapter_of_the_head(variant):
    """The reference is the base's head, which the training pass has not, or not alone."""
    inputs, found = batch(), []
    for place in ("here", "elsewhere"):
        model = wrap(build(), **VARIANTS[variant])
        patch_model(model, constraint("mse"))
        if place == "elsewhere":
            offload(model)
        found.append(gradients(model, model(**inputs).loss))
        with torch.no_grad():
            found[-1]["frozen"] = model.requires_grad_(False).eval()(**inputs).loss
    assert_same(*found)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_is_offloaded_as_a_whole(place, tmp_path):
    """Only its input is trained, as for a soft prompt."""
    inputs = batch()
    ids = inputs.pop("input_ids")

    def run(model):
        soft = build().get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=soft, **inputs).loss
        return loss.detach(), *torch.autograd.grad(loss, soft)

    want = run(build().requires_grad_(False))
    model = build().requires_grad_(False)
    if place == "cpu":
        cpu_offload(model, "cpu")
    else:
        disk_offload(model, tmp_path, "cpu")
    with patch_model(model) as patch:
        found = run(model)
        assert patch.last_parts is not None
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_logits_of_a_head_that_was_offloaded_again():
    """They were never computed, and nobody keeps the weight for them; without labels they are."""
    model, inputs = wrap(build()), batch()
    real = model(**inputs).logits
    patch_model(model)
    offload(model)
    outputs = model(**inputs)
    with pytest.raises(RuntimeError, match=r"has freed the head's weight.*without labels"):
        outputs.logits.sum()
    with pytest.raises(RuntimeError, match="has freed the head's weight"):
        torch.nn.functional.cross_entropy(outputs.logits[0], inputs["labels"][0].clamp(min=0))
    inputs.pop("labels")
    torch.testing.assert_close(model(**inputs).logits, real)


def test_logits_that_are_read_inside_the_forward():
    """They are the model's own, and their graph keeps the weight, as without the patch."""
    model, inputs = wrap(build()), batch()
    want = gradients(model, model(**inputs).loss)
    model.get_output_embeddings().register_forward_hook(lambda head, args, logits: logits.sin())
    with_sine = gradients(model, model(**inputs).loss)
    with patch_model(model):
        weights = offload(model)
        outputs = model(**inputs)
        assert weights.alive == 1
        assert_same(gradients(model, outputs.loss), with_sine)
    assert any(not torch.equal(with_sine[n], want[n]) for n in want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode):
    model, inputs = wrap(build()).eval(), batch()
    want = model(**inputs).loss
    with patch_model(model) as patch:
        weights = offload(model)
        with mode():
            torch.testing.assert_close(model(**inputs).loss, want.detach())
        assert patch.last_parts is not None
        assert weights.alive == 0
