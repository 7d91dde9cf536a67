"""The model of a run, loaded in the run's precision."""

from __future__ import annotations

import torch

from str_kernels.inputs.loading import load_model, merge_adapter, resolve_device
from str_kernels.training.settings import TrainSettings


def load(settings: TrainSettings, *, adapter: str | None = None) -> torch.nn.Module:
    """Load the model onto its device; mixed precision keeps fp32 weights.

    Args:
        settings: the settings of the run.
        adapter: a PEFT adapter that is merged into the weights.
    """
    mixed = settings.dtype.startswith("mixed-")
    name = "float32" if mixed else settings.dtype
    model = load_model(settings.model, dtype=None if name == "auto" else name)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    model.config.use_cache = False  # training needs no cache of keys and values
    return model.to(resolve_device(settings.device))
