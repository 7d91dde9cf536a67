"""Runs of transformers' and TRL's trainers in one of two processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from str_kernels import patch_model
from str_kernels.huggingface import SafetyLogCallback
from tests.distributed.models import Case, Found, gradients

ROWS = 2  # of a process in one forward


class First(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict | None = None
        self.sharded = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sharded = isinstance(model, FSDPModule)
        self.gradients = self.gradients or gradients(model)


def in_order(kind: type) -> type:
    """This trainer, which takes the rows one after another."""

    class InOrder(kind):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    return InOrder


def settings(case: Case, **more: Any) -> dict[str, Any]:
    """Arguments of a trainer: one optimizer step over the whole batch, on CPUs."""
    steps = len(case.labels) // (ROWS * torch.distributed.get_world_size())
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "log_level": "error",
        **more,
    }


def run(case: Case, trainer: Any, first: First) -> Found:
    """Train; the loss is the one that was logged, and all that was logged is there."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return Found(log["loss"], first.gradients, {**log, "sharded": first.sharded})


def rows_of(case: Case) -> list[dict[str, Any]]:
    batch = case.batch()
    return [{name: x[i] for name, x in batch.items()} for i in range(len(case.labels))]


def fresh_state() -> None:
    """Forget the trainer before, but not the processes."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Let accelerate shard on CPUs too; by itself it does so on accelerators alone."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = real


def train_sharded(
    case: Case, config: dict[str, Any], *, by_trl: bool = False, **more: Any
) -> Found:
    """One step of a trainer with accelerate's FSDP2."""
    layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    layers["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
    with fsdp_on_cpus():
        by = train_by_trl if by_trl else train
        found = by(case, fsdp=True, fsdp_config={"version": 2, **layers, **config}, **more)
    assert found.more["sharded"]
    return found


def train(
    case: Case, *, reference: str = "adapter_off", callbacks: Sequence[Any] = (), **more: Any
) -> Found:
    """One step of transformers' `Trainer`."""
    fresh_state()
    model, first = case.model(), First()
    given = {} if case.safety is None else {"positions": case.positions, "reference": reference}
    patch = patch_model(model, case.safety, **given)
    trainer = in_order(Trainer)(
        model=model,
        args=TrainingArguments(**settings(case, **more)),
        train_dataset=rows_of(case),
        callbacks=[first, SafetyLogCallback(patch), *callbacks],
    )
    return run(case, trainer, first)


def train_by_trl(case: Case, *, callbacks: Sequence[Any] = (), **more: Any) -> Found:
    """One step of TRL's `SFTTrainer`, on tokens that need no preparation."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.tiny import word_tokenizer

    fresh_state()
    model, first, batch = case.model(), First(), case.batch()
    given = {} if case.safety is None else {"positions": case.positions}
    patch = patch_model(model, case.safety, **given)
    sizes = batch["attention_mask"].sum(-1).tolist()
    rows = [
        {name: batch[name][i, :size].tolist() for name in ("input_ids", "labels")}
        for i, size in enumerate(sizes)
    ]
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    trainer = in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(**settings(case, bf16=False, **{**prepared, **more})),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer([f"w{i}" for i in range(case.vocab - 5)]),
        callbacks=[first, SafetyLogCallback(patch), *callbacks],
    )
    return run(case, trainer, first)
