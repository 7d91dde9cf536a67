"""Weights that are written past every version counter: noticed, never read as if unchanged."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from str_kernels import VocabularyIndex, notices
from str_kernels.huggingface import patch_model
from str_kernels.huggingface.deferred.freshness import sampled_values
from tests.huggingface.models import batch as small_batch
from tests.huggingface.models import build
from tests.huggingface.patch.test_filtering import batch, model_of, used_index
from tests.huggingface.trainers import lora_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The logits of a patched model"),
    pytest.mark.one_in(2),
]


def swap(weight, new):
    weight.data.copy_(new)


def assign(weight, new):
    weight.data = new


def merge(weight, new):
    weight.data += new


def one_row(weight, new):
    weight.data[7] = new[7]


def half(weight, new):
    weight.data = weight.data.bfloat16()


def storage(weight, new):
    weight.untyped_storage().copy_(new.untyped_storage())


WRITES = [swap, assign, merge, one_row, half, storage]
READS = {
    "logits": lambda logits, labels: logits.argmax(-1),
    "loss": lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
    "derived": lambda logits, labels: (logits.float() * 2).sum(),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", WRITES)
def test_logits_after_a_write(write, read):
    """Unread logits are refused; logits that were read before keep the forward's values."""
    model, inputs = build(), small_batch()
    want = model(**inputs).logits.detach()
    with patch_model(model):
        early, late = model(**inputs), model(**inputs)
        early.logits.sum()
        weight = model.get_output_embeddings().weight
        write(weight, torch.randn_like(weight))
        assert torch.equal(early.logits.detach() + 0, want)
        with pytest.raises(
            RuntimeError, match=r"read outputs\.logits before the step or the write"
        ):
            READS[read](late.logits, inputs["labels"])


def test_swapped_out_again():
    """Averaged weights that came and went leave the forward's values to be read."""
    model, inputs = build(), small_batch()
    want = model(**inputs).logits.detach()
    with patch_model(model):
        out = model(**inputs)
        weight = model.get_output_embeddings().weight
        kept = weight.data.clone()
        weight.data.copy_(torch.randn_like(weight))
        weight.data.copy_(kept)
        assert torch.equal(out.logits.detach() + 0, want)
        kept, weight.data = weight.data, torch.randn_like(weight)
        weight.data = kept
        out = model(**inputs)
        assert torch.equal(out.logits.detach() + 0, want)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "base_layer"])
def test_an_adapter_on_the_head(name):
    """Written factors of the head's own adapter are noticed where the logits depend on them."""
    model, inputs = lora_model(target_modules=["lm_head"]), small_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    want = model(**inputs).logits.detach()
    with patch_model(model):
        out = model(**inputs)
        for found, parameter in model.named_parameters():
            if "lm_head" in found and name in found:
                parameter.data.copy_(torch.randn_like(parameter))
        if name == "lora_A":  # its product was made in the forward
            assert torch.allclose(out.logits.detach() + 0, want, atol=1e-5)
            return
        with pytest.raises(RuntimeError, match=r"read outputs\.logits"):
            out.logits.sum()


def test_a_factor_of_the_models_own():
    """A learned scale between head and logits is an operand of theirs, too."""

    class Scaled(torch.nn.Linear):
        def forward(self, states):
            return F.linear(states, self.weight) * self.scale

    model, inputs = build(), small_batch()
    head = Scaled(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    head.scale = torch.nn.Parameter(torch.tensor(1.5))
    model.set_output_embeddings(head)
    with patch_model(model):
        out = model(**inputs)
        head.scale.data.fill_(3.0)
        with pytest.raises(RuntimeError, match=r"read outputs\.logits"):
            out.logits.sum()


def test_merged_adapters_of_the_body():
    """A merge below the head leaves its hidden states alone: the forward's values."""
    model, inputs = lora_model(), small_batch()
    want = model(**inputs).logits.detach()
    with patch_model(model):
        out = model(**inputs)
        model.merge_adapter()
        assert torch.equal(out.logits.detach() + 0, want)


@pytest.mark.parametrize("write", [*WRITES[:4], storage])
def test_an_automatic_index_is_built_again(write, monkeypatch, caplog):
    """It is that of the new weight to the last bit, and the change is said once."""
    monkeypatch.setattr(notices, "_said", set())
    model = model_of()
    head = model.base_model.model.lm_head.weight
    with patch_model(model) as patch, caplog.at_level(logging.WARNING):
        model(**batch()).loss.backward()
        for seed in range(2):
            torch.manual_seed(seed)
            write(head, torch.randn_like(head))
            model(**batch()).loss.backward()
            index = used_index(patch)
            fresh = VocabularyIndex.of_order(head, index.order)
            assert torch.equal(index.mean_rows, fresh.mean_rows)
            filtered = model(**batch()).loss
    with patch_model(model, filter_eps=0.0):
        assert filtered.item() == pytest.approx(model(**batch()).loss.item(), rel=1e-3)
    assert caplog.text.count("weight has changed, so its vocabulary index is built again") == 1


def test_averaged_weights_for_an_evaluation():
    """Swapped in: evaluated exactly. Swapped out, by torch's counted writes or past them: the
    index of before, without another clustering.
    """
    model = model_of()
    head = model.base_model.model.lm_head.weight
    with patch_model(model) as patch:
        model(**batch()).loss.backward()
        index, kept = used_index(patch), head.detach().clone()
        with torch.no_grad():
            before = model.eval()(**batch()).loss
            for write in (head.data.copy_, head.copy_):
                write(kept * 1.5)
                swapped = model(**batch()).loss
                write(kept)
                assert torch.equal(model(**batch()).loss, before)
                assert used_index(patch) is index
            head.data.copy_(kept * 1.5)
            patch.unpatch()
            assert torch.allclose(swapped, model(**batch()).loss, rtol=1e-5)


def test_an_index_of_the_users_is_refused():
    """Its owner has to build it again."""
    model = model_of()
    head = model.base_model.model.lm_head.weight
    with patch_model(model, index=VocabularyIndex.build(head)):
        model(**batch())
        head.data.mul_(2.0)
        with pytest.raises(ValueError, match=r"index: was built from another weight .* again"):
            model(**batch())


def test_sampled_values():
    """Every row counts, NaN equals itself, any dtype; nothing of three dimensions."""
    weight = torch.randn(1000, 7)
    before = sampled_values(weight)
    for row in range(1000):
        changed = weight.clone()
        changed[row] += 1.0
        assert not torch.equal(sampled_values(changed), before)
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        x = torch.full((5, 3), float("nan")).to(dtype)
        assert torch.equal(sampled_values(x), sampled_values(x.clone()))
    assert len(sampled_values(torch.zeros(9))) == 36
    assert sampled_values(torch.zeros(2, 3, 4)) is None
    for empty in (torch.zeros(0), torch.zeros(3, 0), torch.zeros(0, 3)):
        assert not len(sampled_values(empty))
    assert torch.equal(sampled_values(weight.T.contiguous().T), before)
