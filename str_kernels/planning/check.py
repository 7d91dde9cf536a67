"""A real step of the planned model on this machine, measured beside what was counted.

Stage: the plan's settings, a short context → the most bytes that two steps have alive.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from str_kernels.bench.memory import peak_bytes, within_free_memory
from str_kernels.huggingface import patch_model
from str_kernels.options import SafetyConstraint
from str_kernels.planning.levers import Levers
from str_kernels.planning.subject import read_config
from str_kernels.training.lora import add_lora


def measured_bytes(
    model: str,
    context: int,
    levers: Levers,
    *,
    rank: int,
    dtype: torch.dtype,
    batch: int,
    safety_tokens: int,
    device: torch.device,
) -> int:
    """Run two steps of a model with random weights, and return the most bytes alive at once.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine has no room for it.
    """
    with within_free_memory(device):
        torch.manual_seed(0)
        config = read_config(model)
        config.use_cache = False
        inner = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
        adapted = add_lora(inner, rank=rank).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        vocabulary = inner.get_output_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (batch, context), device=device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        safety = SafetyConstraint(range(safety_tokens)) if safety_tokens else None
        patch = patch_model(adapted, safety) if levers.fused_head else None

        losses: list[torch.Tensor] = []

        def forward() -> None:
            losses.append(adapted(**given).loss)

        def backward() -> None:
            losses.pop().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps = (forward, backward) * 2  # the first makes the optimizer's states and the index
        with levers.body.apply(adapted):
            found = _held(adapted) + peak_bytes(steps[0], device, *steps[1:]).peak
        if patch is not None:
            patch.unpatch()
        return found


def _held(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(sizes.values())
