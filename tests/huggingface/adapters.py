"""Models with adapters, and constraints for them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from str_kernels import SafetyConstraint
from tests.huggingface.models import build

TOKENS = [3, 17, 40, 95]
SAFETY = SafetyConstraint(TOKENS, 0.5)
BODY = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "whole head": {"modules_to_save": ["lm_head"]},
    "lora on the head": {"target_modules": [*BODY, "lm_head"]},
    "dora on the head": {"target_modules": [*BODY, "lm_head"], "use_dora": True},
    "trainable tokens": {"trainable_token_indices": [3, 5]},
}


def wrap(model, **settings):
    """The model with a LoRA adapter that has moved away from zero."""
    torch.manual_seed(2)
    settings = {"target_modules": BODY, "init_lora_weights": False, **settings}
    wrapped = get_peft_model(model, LoraConfig(r=4, **settings))
    for name, parameter in wrapped.named_parameters():  # a whole head starts as the base's
        if "modules_to_save" in name:
            parameter.data.mul_(1.1)
    return wrapped


def lora(name: str = "llama"):
    """One of the architectures, wrapped."""
    gpt2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    return wrap(build(name), **(gpt2 if name == "gpt2" else {}))


def constraint(kind: str = "mse", strength: float = 0.5) -> SafetyConstraint:
    extra = {"kl": {"temperature": 2.0}}.get(kind, {})
    return SafetyConstraint(TOKENS, strength, kind=kind, **extra)
