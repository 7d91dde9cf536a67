"""The index of a frozen head is made by itself, and a filter that errs is put right, aloud."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.backends.torch import TorchBackend
from str_kernels.huggingface import patch_model
from str_kernels.huggingface.patch import filtering
from str_kernels.huggingface.patch.filtering import SMALLEST_VOCABULARY

VOCAB = SMALLEST_VOCABULARY


def model_of(vocab: int = VOCAB, lora: bool = True):
    """A Llama whose head has ``vocab`` rows, larger than usual so that its softmax is not flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1.5)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model.train()


def batch(vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Two rows of eight tokens, all labelled."""
    ids = torch.randint(0, vocab, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def used_index(patch):
    """The index that the automatic one holds."""
    return patch._source._index


def test_made_once_from_the_first_training_batch():
    """Evaluation builds nothing; the first training batch does, and later ones use the same."""
    model = model_of()
    with patch_model(model, SafetyConstraint([1, 2], 1.0)) as patch:
        with torch.no_grad():
            model.eval()(**batch())
        assert used_index(patch) is None
        model.train()(**batch()).loss.backward()
        first = used_index(patch)
        assert isinstance(first, VocabularyIndex)
        assert len(first.order) == VOCAB
        model(**batch()).loss.backward()
        assert used_index(patch) is first
        assert patch.last_parts.dead_mass.max() > 0


def test_made_again_when_the_head_changes():
    """New values in the head, or new rows: a new index, never a stale or refused one."""
    model = model_of()
    with patch_model(model) as patch:
        model(**batch()).loss.backward()
        first = used_index(patch)
        with torch.no_grad():
            model.base_model.model.lm_head.weight.mul_(2.0)
        model(**batch()).loss.backward()
        second = used_index(patch)
        assert second is not first
        model.base_model.model.resize_token_embeddings(VOCAB + 64)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model(**batch()).loss.backward()
        assert len(used_index(patch).order) == VOCAB + 64


def test_made_again_late_where_the_host_must_not_wait(no_waits, monkeypatch):
    """What torch counts is noticed at once; a write through ``.data`` soon, and never an error."""
    monkeypatch.setattr(filtering, "_COMPARED_EVERY", 3)
    model = model_of()
    weight = model.base_model.model.lm_head.weight
    with patch_model(model) as patch:
        model(**batch())
        first = used_index(patch)
        weight.data.mul_(2.0)
        for _ in range(3):
            model(**batch())
            assert used_index(patch) is first
        model(**batch())
        second = used_index(patch)
        assert second is not first
        with torch.no_grad():
            weight.mul_(2.0)
        model(**batch())
        assert used_index(patch) is not second


@pytest.mark.parametrize("why", ["trainable", "small", "eps", "none"])
def test_not_made_where_it_does_not_pay(why):
    """A trained head, a small vocabulary, the exact pass, or index=None: exact, and no index."""
    vocab = 512 if why == "small" else VOCAB
    model = model_of(vocab, lora=why != "trainable")
    options = {"eps": {"filter_eps": 0.0}, "none": {"index": None}}.get(why, {})
    with patch_model(model, **options) as patch:
        model(**batch(vocab)).loss.backward()
        assert used_index(patch) is None
        assert patch.last_parts.dead_mass.max() == 0


def test_filtered_training_follows_exact_training():
    """Ten steps with the automatic index and ten exact ones end at the same loss to 1e-3."""
    losses = []
    for eps in ("auto", 0.0):
        model = model_of()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        with patch_model(model, filter_eps=eps):
            for _ in range(10):
                loss = model(**batch()).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


def test_the_guard_reports_and_leaves_a_sound_filter_alone():
    """A check at the first loss and every second one later; nothing changes when it passes."""
    model = model_of()
    with patch_model(model, check_accuracy_every=2) as patch:
        reports = []
        for _ in range(4):
            model(**batch()).loss.backward()
            reports.append(patch.guard.last_report)
        assert reports[0] is reports[1] is not reports[2]
        assert reports[2] is reports[3]
        assert patch.options.filter_eps == "auto"
        assert reports[0].acceptable, reports[0]


def test_the_guard_falls_back_aloud():
    """An index whose mean rows are wrong: first the exact screen, then the exact pass, each said
    once, after which the loss is the exact one.
    """
    model = model_of()
    head = model.base_model.model.lm_head
    index = VocabularyIndex.build(head.weight)
    broken = replace(index, mean_rows=index.mean_rows.flip(0) + 500.0)
    with patch_model(model, index=broken, check_accuracy_every=1) as patch:
        with pytest.warns(UserWarning, match="the screen runs in full precision"):
            model(**batch())
        assert patch.options.screen == "exact"
        with pytest.warns(UserWarning, match="every logit is exact"):
            model(**batch())
        assert patch.options.filter_eps == 0.0
        model(**batch())
        assert patch.guard.last_report.gradient_error == 0


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_bad_period(every):
    """Not a positive integer: named."""
    with pytest.raises(ValueError, match="check_accuracy_every="):
        patch_model(model_of(512), check_accuracy_every=every)


def test_a_flat_softmax_is_computed_exactly():
    """Where nearly every tile matters the index is dropped after its first loss: from then on the
    pass is the exact one, which costs less.
    """
    model = model_of()
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(0.01)
    with patch_model(model) as patch:
        model(**batch()).loss.backward()
        assert patch.last_parts.live_share.nanmean() > 0.4
        model(**batch()).loss.backward()
        assert used_index(patch) is None
        assert (patch.last_parts.dead_mass == 0).all()


def test_an_index_is_judged_by_a_filtered_loss(monkeypatch):
    """A loss of few positions computes every tile exactly, which is no reason to drop the index."""
    model, few = model_of(), [True]
    monkeypatch.setattr(TorchBackend, "filters", lambda self, *given: not few[0])
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(0.01)
    with patch_model(model) as patch:
        for _ in range(2):
            model(**batch()).loss.backward()
            assert (patch.last_parts.live_share.nan_to_num(1.0) == 1).all()
            assert (patch.last_parts.dead_mass == 0).all()
        assert used_index(patch) is not None
        few[0] = False
        model(**batch()).loss.backward()
        model(**batch()).loss.backward()
        assert used_index(patch) is None
