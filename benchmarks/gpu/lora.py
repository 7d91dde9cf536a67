"""Step 7b: LoRA steps of a whole model of random weights, with and without the constraint.

Random weights predict nothing, so every pair is live: the filter's worst case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.run import Run
from str_kernels import SafetyConstraint, patch_model, unpatch_model
from str_kernels.bench.clock import bare_product, paired
from str_kernels.bench.memory import peak_bytes
from str_kernels.huggingface.constraint.references import build_reference_cache
from str_kernels.training.lora import add_lora

RANK, TOKENS = 16, 64


def lora(run: Run) -> None:
    """Add steps of batch 1: unpatched, patched, and constrained by adapter or by cache."""
    run.forget()
    size = run.sizes.model
    torch.manual_seed(0)
    model = _model(run)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(size.vocab, (1, size.context), device=run.device)
    hidden = torch.randn(size.context, size.hidden, device=run.device, dtype=torch.bfloat16)
    weight = model.get_output_embeddings().weight.detach()
    safety = SafetyConstraint([i * size.vocab // TOKENS for i in range(TOKENS)])

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "references.safetensors"
        methods: dict[str, Callable[[], object]] = {
            "unpatched": lambda: None,
            "patched": lambda: patch_model(model),
            "patched, STR, adapter off": lambda: patch_model(model, safety),
            "patched, STR, cached": lambda: _cached(model, ids, cache, safety),
        }
        for name, prepare in methods.items():
            facts = {"N": size.context, "V": size.vocab, "D": size.hidden, "dtype": "bfloat16"}
            if not run.todo(name):
                continue
            prepare()
            try:
                found = _measured(run, step, (hidden, weight))
            finally:
                if name != "unpatched":
                    unpatch_model(model)
            run.add(name, context=facts, **found)


def _cached(model, ids: torch.Tensor, cache: Path, safety: SafetyConstraint) -> None:
    build_reference_cache(model, [{"input_ids": ids}], cache, safety)
    patch_model(model, safety, reference=cache)


def _measured(run: Run, step: Callable[[], object], operands: tuple) -> dict[str, Any]:
    loss = float(step())  # compiles, builds an index
    options = run.clock() | {"budget_s": 4 * run.sizes.budget_s}  # a step is long
    timing = paired(step, bare_product(*operands), device=run.device, **options)
    peak = peak_bytes(step, run.device)
    return {"loss": loss, **timing.as_row(), "peak_bytes": peak.peak}


def _model(run: Run) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = run.sizes.model
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
    )
    with run.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = add_lora(model, rank=RANK, target_modules=("q_proj", "v_proj")).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model
