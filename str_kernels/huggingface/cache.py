"""`build_reference_cache`: the aligned model's opinion of a data set, computed once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from str_kernels.huggingface.install import causal_lm, find_patch, patch_model
from str_kernels.huggingface.instance import inner_forward
from str_kernels.huggingface.reference_pass import (
    adapter_layers,
    reference_fold,
    safety_reference,
)
from str_kernels.options import LossOptions, SafetyConstraint
from str_kernels.safety.references import content_key, real_tokens, save_reference_cache


def build_reference_cache(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    path: str | os.PathLike,
    safety: SafetyConstraint,
) -> int:
    """Compute the reference of every sequence once and save it for ``patch_model(reference=path)``.

    The references are fp16 on disk: 2·K bytes a token, rounded by 2⁻¹¹ of their size.

    Args:
        model: the aligned model, with or without (then disabled) adapters; patched or not.
        batches: dicts of ``input_ids [B, T]`` and perhaps ``attention_mask [B, T]``, as the trainer
            will see them; other arguments of the model's forward may be there, labels are ignored.
        path: the safetensors file to write.
        safety: the constraint of the run to come.

    Returns:
        How many sequences were stored.

    Raises:
        ValueError: no folder to write into, no batch, or a batch without ``input_ids``.
    """
    _require_writable(Path(path))
    inner, options = causal_lm(model), LossOptions(safety=safety, filter_eps=0.0)
    references: dict[str, Tensor] = {}
    with ExitStack() as stack:
        if find_patch(inner) is None:
            stack.enter_context(patch_model(inner))
        for batch in batches:
            if batch.get("input_ids") is None:
                raise ValueError("batches: one has no input_ids, by which the cache is looked up.")
            references.update(_sequences(inner, dict(batch), options))
    if not references:
        raise ValueError("batches: held no sequence, so there is nothing to save.")
    save_reference_cache(path, references, safety)
    return len(references)


def _sequences(
    model: nn.Module, arguments: dict[str, Tensor], options: LossOptions
) -> dict[str, Tensor]:
    """References ``[T, K]`` of the sequences of a batch, by the key of their content."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    adapters = bool(adapter_layers(model))
    fold = reference_fold(model, inner_forward(model), arguments, adapters=adapters)
    real = torch.ones_like(ids) if mask is None else mask
    values = safety_reference(fold, real.reshape(-1) != 0, options).reshape(*ids.shape, -1)
    return {
        content_key(sequence): values[row, where].cpu()
        for row, (where, sequence) in enumerate(real_tokens(ids, mask))
    }


def _require_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"path={str(path)!r}: must be a file in a folder that can be written to.")
