"""The adapter: LoRA on the named modules, and on the head only if it is named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from str_kernels.training.settings import ALL_LINEAR


def add_lora(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ALL_LINEAR,
) -> PeftModel:
    """Wrap a causal language model; its own weights are frozen.

    Args:
        model: the model, which is changed.
        rank: LoRA rank.
        alpha: LoRA alpha; None: twice the rank.
        dropout: LoRA dropout.
        target_modules: names of the adapted modules; ``ALL_LINEAR`` is every linear layer but the
            head.

    Raises:
        ValueError: no module of the model has one of the names.
    """
    names = tuple(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if names == ALL_LINEAR else list(names),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"target_modules={', '.join(names)}: {error}") from error
