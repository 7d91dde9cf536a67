"""TRL's SFTTrainer brings a head of its own: refused, or given back the loss of transformers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from str_kernels.huggingface import PatchedLossMixin, patch_model
from tests.huggingface.test_trainer import SAFETY, lora_model, rows
from tests.tiny import word_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")


class FusedSFTTrainer(PatchedLossMixin, trl.SFTTrainer):
    """What the error message says to write."""


def settings_for(folder, **settings):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "lr_scheduler_type": "constant",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        **settings,
    }
    return trl.SFTConfig(**arguments)


def sft(model, folder, trainer, **settings):
    arguments = settings_for(folder, **settings)
    data = Dataset.from_list(rows())

    def collate(examples):
        return {name: torch.tensor([e[name] for e in examples]) for name in examples[0]}

    return trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        processing_class=word_tokenizer(),
    )


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_its_own_loss_is_refused(first, tmp_path):
    """Its head would leave the constraint out: an error that says what to write instead."""
    model = lora_model()
    if first == "patch":
        patch_model(model, SAFETY)
    trainer = sft(model, tmp_path, trl.SFTTrainer)
    if first == "trainer":
        patch_model(model, SAFETY)
    with pytest.raises(ValueError, match=r"class MyTrainer.*PatchedLossMixin, SFTTrainer"):
        trainer.train()


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_without_a_constraint_it_goes_its_own_way(first, tmp_path):
    """Nothing is lost then, so nothing is refused; that the patch is idle is said."""
    model = lora_model()
    if first == "patch":
        patch_model(model)
    trainer = sft(model, tmp_path, trl.SFTTrainer)
    if first == "trainer":
        patch_model(model)
    with pytest.warns(UserWarning, match="computes its loss past it"):
        trainer.train()


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_with_the_loss_of_transformers(first, tmp_path):
    """As the error message says: it trains with the constraint."""
    model = lora_model()
    patch = patch_model(model, SAFETY) if first == "patch" else None
    trainer = sft(model, tmp_path, FusedSFTTrainer)
    patch = patch or patch_model(model, SAFETY)
    trainer.train()
    assert patch.last_parts.penalty > 0
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 3


def history(trainer) -> list[dict]:
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_numbers_of_sft_trainer(settings, tmp_path):
    """Without a constraint: SFTTrainer's own losses, gradient norms, accuracies and counts."""
    want = history(sft(lora_model(), tmp_path, trl.SFTTrainer, **settings))
    model = lora_model()
    patch_model(model)
    got = history(sft(model, tmp_path, FusedSFTTrainer, **settings))
    assert len(got) == len(want) == 3
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["mean_token_accuracy"] == pytest.approx(b["mean_token_accuracy"], abs=1e-6)
        assert a["num_tokens"] == b["num_tokens"]


@pytest.mark.parametrize("packing", [False, True], ids=["padding-free", "packed"])
def test_rows_without_padding(packing, tmp_path):
    """Sequences one after another in a row, told apart by position ids: SFTTrainer's losses."""
    data = Dataset.from_list(
        [
            {"input_ids": list(range(3 + i, 3 + i + n))}
            for i, n in enumerate((5, 9, 7, 6, 8, 5, 9, 7))
        ]
    )
    losses = []
    for kind in (trl.SFTTrainer, FusedSFTTrainer):
        model = lora_model()
        if kind is FusedSFTTrainer:
            patch_model(model)
        arguments = settings_for(
            tmp_path, packing=packing, padding_free=True, dataset_kwargs=None,
            max_length=16 if packing else None, remove_unused_columns=True,
            per_device_train_batch_size=2, seed=1,
        )  # fmt: skip
        trainer = kind(
            model=model, args=arguments, train_dataset=data, processing_class=word_tokenizer()
        )
        losses.append([log["loss"] for log in history(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_losses_that_are_not_the_models(tmp_path):
    """Another loss type, or a model that is not patched: refused by name."""
    model = lora_model()
    with pytest.raises(ValueError, match="the model is not patched"):
        sft(model, tmp_path, FusedSFTTrainer).train()
    patch_model(model, SAFETY)
    with pytest.raises(ValueError, match="loss_type='dft'"):
        sft(model, tmp_path, FusedSFTTrainer, loss_type="dft").train()


def test_evaluation(tmp_path):
    """``evaluate`` gives the loss of the patched model."""
    model = lora_model()
    patch_model(model, SAFETY)
    trainer = sft(model, tmp_path, FusedSFTTrainer)
    found = trainer.evaluate(Dataset.from_list(rows(4)))
    assert found["eval_loss"] > 0
    assert 0 <= found["eval_mean_token_accuracy"] <= 1


def test_preferences_are_refused_by_name(tmp_path):
    """DPO has no cross-entropy to hold: an error with a constraint, its own way without."""
    data = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e"] * 4})
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        bf16=False, per_device_train_batch_size=2,
    )  # fmt: skip
    for safety in (None, SAFETY):
        model = lora_model()
        patch_model(model, safety)
        trainer = trl.DPOTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=word_tokenizer()
        )
        if safety is None:
            with pytest.warns(UserWarning, match="computes its loss past it"):
                trainer.train()
        else:
            with pytest.raises(ValueError, match="DPO, GRPO, KTO"):
                trainer.train()
