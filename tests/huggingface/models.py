"""Tiny causal language models of several architectures, and what the tests compare on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# fp32: sums of a few thousand products in another order, 2^-24 each, seen through two layers
FP32 = 5e-6
VOCAB = 96
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2,
        bos_token_id=1, pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _mixtral() -> nn.Module:
    config = MixtralConfig(
        **_SHAPE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SHAPE, head_dim=8, final_logit_softcapping=2.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE, head_dim=8)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SHAPE, logit_scale=0.25)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**_SHAPE, head_dim=8, logit_scale=0.25)),
    "gpt2": _gpt2,
    "mixtral": _mixtral,
}


def build(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with logits far enough apart for its scale and softcap to matter; train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.get_input_embeddings().parameters():
                parameter.normal_(std=0.5)
            model.get_output_embeddings().weight.normal_(std=0.5)
    return model.to(dtype).train()


def batch(rows: int = 3, length: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """Right-padded sequences of several lengths, each with a prompt that has no labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        end = length - row
        mask[row, end:], ids[row, end:], labels[row, end:] = 0, 0, -100
        labels[row, : 2 + row] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter that has one, by name."""
    model.zero_grad(set_to_none=True)
    return gradients(model, model(**inputs).loss)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """This loss, and the gradient of every parameter that has one, by name."""
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-12)).item()


def assert_same(got: dict, want: dict, tolerance: float = FP32) -> None:
    errors = {name: relative(got[name], want[name]) for name in want}
    assert got.keys() == want.keys()
    assert max(errors.values()) <= tolerance, errors


def snapshot(model: nn.Module) -> dict:
    """Every attribute of every module, by name."""
    return {
        (name, key): list(value.items()) if hasattr(value, "items") else value
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
    }
