"""The model of a run, loaded in the run's precision."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from str_kernels.huggingface.deferred.modes import evaluates_otherwise
from str_kernels.inputs.loading import load_model, merge_adapter, resolve_device
from str_kernels.training.settings import TrainSettings


def load(settings: TrainSettings, *, adapter: str | None = None) -> torch.nn.Module:
    """Load the model onto its device; mixed precision keeps fp32 weights.

    Args:
        settings: the settings of the run.
        adapter: a PEFT adapter that is merged into the weights.
    """
    device = resolve_device(settings.device)
    if settings.packed:
        model = _load_packed(settings, device)
    else:
        mixed = settings.dtype.startswith("mixed-")
        name = "float32" if mixed else settings.dtype
        model = load_model(settings.model, dtype=None if name == "auto" else name)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    model.config.use_cache = False  # training needs no cache of keys and values
    return model if settings.packed else model.to(device)


def _load_packed(settings: TrainSettings, device: torch.device) -> torch.nn.Module:
    """Load the body in 4 or 8 bits, by bitsandbytes; embeddings, head and norms are bf16."""
    kind = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**kind[settings.dtype])
    loaded = load_model(
        settings.model, dtype="bfloat16", quantization_config=config, device_map={"": device}
    )
    for module in loaded.modules():
        module.training = evaluates_otherwise(module)
    return loaded
