"""TRL's SFTTrainer brings a head of its own: refused, or given back the loss of transformers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from str_kernels.huggingface import patch_model
from tests.huggingface.test_trainer import SAFETY, lora_model, rows
from tests.tiny import word_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")


class FusedSFTTrainer(trl.SFTTrainer):
    """What the error message says to write."""

    compute_loss = Trainer.compute_loss


def sft(model, folder, trainer):
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        lr_scheduler_type="constant",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
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
    with pytest.raises(ValueError, match=r"compute_loss = transformers\.Trainer\.compute_loss"):
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
