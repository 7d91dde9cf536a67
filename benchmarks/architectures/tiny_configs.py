"""Build a tiny model of any architecture: its config's defaults with every size made small.

What a field means is guessed by its name, the same in most of transformers; ``EXTRA`` has the few
fields of the few architectures for which that is not enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.architectures.tiny_sizes import DEFAULTS, EXTRA, PARTS, SMALL

VOCAB = SMALL["vocab_size"]
TASKS = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
# a config's own names for what happens to its logits and its loss, and what to set
SWITCHES = {
    "logit_scale": 0.25, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "output_multiplier": 0.5,
    "logits_scale": 0.5, "logit_scaling": 4.0, "logits_multiplier": 0.5,
    "final_logit_softcapping": 2.0, "logits_soft_cap": 2.0, "logits_softcap": 2.0,
    "logit_softcapping": 2.0, "final_logit_softcap": 2.0,
    "output_router_logits": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip
_OPTIONAL = {  # which a small value would switch on where the default is None: off
    "unpadded_vocab_size", "n_inner", "num_key_value_heads", "rotary_dim", "sliding_window",
    "q_lora_rank", "kv_lora_rank", "num_experts", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id",
}  # fmt: skip


def build_architecture(model_type: str, task: str = "causal") -> nn.Module:
    """Build a tiny random fp32 model in evaluation mode, its logits some units apart."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    if (task, model_type) in PARTS:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind._from_config(getattr(config, PARTS[task, model_type]))
    else:
        model = TASKS[task][0].from_config(config)
    model = model.float().eval()
    head = model.get_output_embeddings()
    if head is not None:
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.normal_(std=0.3 if name.endswith("weight") else 0.1)
    return model


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the config of a tiny model; scale and softcap, if it has any, are not 1."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind(**DEFAULTS.get(model_type, {})), EXTRA.get(model_type, {})))


def _shrunk(default: PretrainedConfig, extra: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    fields = {n: x for n, x in (default.to_dict() | vars(default)).items() if _is_set(default, n)}
    for name in sorted(fields):
        value = fields[name]
        if isinstance(value, PretrainedConfig):
            below = extra.get(name, {})
            values[name] = {"model_type": value.model_type, **_shrunk(value, below)}
        elif name in SMALL:
            optional = value is None and name in _OPTIONAL and SMALL[name] is not None
            if not isinstance(value, list | tuple | bool) and not optional:
                values[name] = SMALL[name]
        elif name in SWITCHES and (value is not None or name.startswith("final_logit")):
            values[name] = SWITCHES[name]
        elif name.endswith(("dropout", "_pdrop", "dropout_prob", "_drop")) and value == 0.0:
            values[name] = 0.1
    values |= _layers(default, values)
    if "kv_lora_rank" in fields and "num_key_value_heads" in values:
        values["num_key_value_heads"] = SMALL["num_attention_heads"]
    below = {name for name, value in fields.items() if isinstance(value, PretrainedConfig)}
    return values | {name: value for name, value in extra.items() if name not in below}


def _is_set(default: PretrainedConfig, name: str) -> bool:
    """Return whether a field may be given and is not derived from others."""
    name = type(default).attribute_map.get(name, name)
    found = getattr(type(default), name, None)
    return not isinstance(found, property) or found.fset is not None


def _layers(default: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of every kind in the default, and rotary sections that fit a head of 8."""
    found: dict[str, Any] = {}
    kinds = getattr(default, "layer_types", None)
    if isinstance(kinds, list | tuple) and kinds and _is_set(default, "layer_types"):
        kinds = sorted(set(kinds), key=lambda kind: ("full" in kind, kind))
        found["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        for name in ("num_hidden_layers", "num_layers", "n_layers"):
            if name in values:
                found[name] = len(found["layer_types"])
    rotary = getattr(default, "rope_parameters", None)
    if isinstance(rotary, dict) and "mrope_section" in rotary:
        part = rotary.get("partial_rotary_factor", getattr(default, "partial_rotary_factor", 1))
        pairs = int(SMALL["head_dim"] // 2 * (part or 1))
        section = [pairs - 2, 1, 1] if pairs > 2 else [1, 1, 0]
        found["rope_parameters"] = {**rotary, "mrope_section": section}
    return found
