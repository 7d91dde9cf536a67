"""Reference caches: the references of a data set, computed once, saved, and read back by content.

Stage: batches → the pass with the adapters off → a file → references ``[B, T, K]`` of a batch.

A cache is one safetensors file. Each tensor is ``[T, K]`` fp16, the reference of every position of
one token sequence, named by the sequence's hash; the metadata name the safety tokens and the unit.
Padding does not matter: only the real tokens are hashed, and only they get values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from str_kernels.files import replacing
from str_kernels.huggingface.constraint.adapters import adapter_layers
from str_kernels.huggingface.constraint.reference_pass import reference_fold, safety_reference
from str_kernels.huggingface.deferred.forward import inner_forward
from str_kernels.huggingface.deferred.head import (
    causal_lm,
    deferrable_head,
    find_head,
    validate_tokens,
)
from str_kernels.options import LossOptions, SafetyConstraint

SCHEMA = "str_kernels.reference_cache/1"


def content_key(token_ids: Sequence[int]) -> str:
    """Name of a token sequence: a hash of its ids, without padding."""
    text = ",".join(map(str, token_ids))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def reference_unit(safety: SafetyConstraint) -> str:
    """The unit of this constraint's reference: ``"logits"`` or ``"logprobs"``."""
    return "logprobs" if safety.kind == "logprob" else "logits"


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[Tensor, list[int]]]:
    """For each row of ``[B, T]``: the positions that are not padding, and their token ids."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for ids, row_mask in zip(input_ids, mask, strict=True):
        where = row_mask.nonzero()[:, 0]
        rows.append((where, ids[where].tolist()))
    return rows


class ReferenceCache:
    """Reads the references of batches from a cache file.

    Args:
        path: a file that ``save_reference_cache`` wrote.
        safety: the constraint of this run; must name the same tokens and the same unit.

    Raises:
        ValueError: no such file, not a cache, or one made for another constraint.
    """

    def __init__(self, path: str | os.PathLike, safety: SafetyConstraint) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"reference={os.fspath(path)!r}: no such file; make one with str-kernels cache or "
                "build_reference_cache, or use 'adapter_off'."
            )
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"reference={os.fspath(path)!r}: not a safetensors file ({error})."
            ) from None
        self._check(safety)
        self._keys = set(self._file.keys())

    def __deepcopy__(self, memo: dict) -> ReferenceCache:
        return self  # read only, and the open file cannot be copied

    def _check(self, safety: SafetyConstraint) -> None:
        metadata = self._file.metadata() or {}
        if metadata.get("schema") != SCHEMA:
            raise ValueError(
                f"reference={str(self.path)!r}: schema is {metadata.get('schema')!r}, "
                f"must be {SCHEMA!r}."
            )
        if tuple(json.loads(metadata["token_ids"])) != safety.token_ids:
            raise ValueError(
                f"reference={str(self.path)!r}: was computed for other safety tokens; compute it "
                "again for these."
            )
        if metadata["unit"] != reference_unit(safety):
            raise ValueError(
                f"reference={str(self.path)!r}: holds {metadata['unit']}, but kind={safety.kind!r} "
                f"needs {reference_unit(safety)}; compute it again with this kind."
            )

    def holds(self, token_ids: Sequence[int]) -> bool:
        """Whether there are references of this sequence, given without padding."""
        return content_key(token_ids) in self._keys

    def lookup(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """References ``[B, T, K]`` fp32 of a batch ``[B, T]``; zero on padding.

        Raises:
            ValueError: a sequence that is not in the cache (packed or cut differently).
        """
        found = None
        for row, (where, ids) in enumerate(real_tokens(input_ids, attention_mask)):
            key = content_key(ids)
            if key not in self._keys:
                raise ValueError(
                    f"reference={str(self.path)!r}: holds nothing for row {row} of this batch "
                    f"({len(ids)} tokens); packing, truncation or the data changed "
                    "since it was made."
                )
            values = self._file.get_tensor(key).float()
            if found is None:
                found = torch.zeros(*input_ids.shape, values.shape[-1])
            found[row, where.cpu()] = values
        return found.to(input_ids.device)


def save_reference_cache(
    path: str | os.PathLike, references: dict[str, Tensor], safety: SafetyConstraint
) -> None:
    """Write ``{content_key: [T, K]}`` as fp16; the file appears whole or not at all.

    Raises:
        ValueError: a value beyond the range of fp16.
    """
    tensors = {}
    for key, values in references.items():
        half = values.detach().half().cpu().contiguous()
        if half.isinf().any() and not values.isinf().any():
            raise ValueError(
                f"references hold {values.abs().max().item():.4g}: too large for fp16."
            )
        tensors[key] = half
    metadata = {
        "schema": SCHEMA,
        "token_ids": json.dumps(list(safety.token_ids)),
        "unit": reference_unit(safety),
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)


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
    inner = causal_lm(model)
    head = find_head(inner)
    validate_tokens(safety.token_ids, head)
    references: dict[str, Tensor] = {}
    with deferrable_head(head):
        for batch in batches:
            if batch.get("input_ids") is None:
                raise ValueError("batches: one has no input_ids, by which the cache is looked up.")
            references.update(_sequences(inner, dict(batch), safety))
    if not references:
        raise ValueError("batches: there was no sequence, so there is nothing to save.")
    save_reference_cache(path, references, safety)
    return len(references)


def _sequences(
    model: nn.Module, arguments: dict[str, Tensor], safety: SafetyConstraint
) -> dict[str, Tensor]:
    """References ``[T, K]`` of the sequences of a batch, by the key of their content."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    adapters = bool(adapter_layers(model))
    fold = reference_fold(model, inner_forward(model), arguments, adapters=adapters)
    real = torch.ones_like(ids) if mask is None else mask
    options = LossOptions(safety=safety, filter_eps=0.0)
    values = safety_reference(fold, real.reshape(-1) != 0, options).reshape(*ids.shape, -1)
    return {
        content_key(sequence): values[row, where].cpu()
        for row, (where, sequence) in enumerate(real_tokens(ids, mask))
    }


def _require_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"path={str(path)!r}: must be a file in a folder that can be written to.")
