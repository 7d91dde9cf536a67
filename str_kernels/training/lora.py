"""The adapter: LoRA on the named modules, never on the head unless it is named."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from str_kernels.training.settings import TrainSettings


def add_lora(model: torch.nn.Module, settings: TrainSettings) -> PeftModel:
    """Wrap a causal language model; its own weights are frozen.

    Raises:
        ValueError: no module of the model has one of the names.
    """
    names = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=names[0] if names == ("all-linear",) else list(names),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"target_modules={', '.join(names)}: {error}") from error
