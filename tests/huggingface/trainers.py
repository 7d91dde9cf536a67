"""Runs of transformers' Trainer on a tiny model, and what the tests compare of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from str_kernels import SafetyConstraint
from tests.huggingface.models import batch, build

SAFETY = SafetyConstraint([3, 17, 40, 95], 2.0, "mse")


class Losses(TrainerCallback):
    """Collects what the trainer logs."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def rows(count: int = 16) -> list[dict]:
    many = batch(rows=8, seed=3)
    listed = [{name: x[i].tolist() for name, x in many.items()} for i in range(8)]
    return (listed * (count // 8 + 1))[:count]


def trainer_for(
    model, folder, *, callbacks=(), trainer=Trainer, dataset=None, tokenizer=None, **settings
):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        "lr_scheduler_type": "constant",
        **settings,
    }
    return trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=dataset or rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
        processing_class=tokenizer,
    )


def run(model, folder, **settings) -> list[dict]:
    seen = Losses()
    trainer_for(model, folder, callbacks=[seen], **settings).train()
    return [log for log in seen.logs if "loss" in log]


def lora_model(**settings):
    torch.manual_seed(2)
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    return get_peft_model(build(), LoraConfig(r=4, **settings))


def assert_equal_runs(got: list[dict], want: list[dict], tolerance: float = 2e-5) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
