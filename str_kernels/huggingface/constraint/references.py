"""Reference caches: the references of a data set, computed once, saved, and read back by content.

Stage: batches → the pass with the adapters off → a file → references ``[B, T, K]`` of a batch.

A cache is one safetensors file. Each tensor is ``[T, K]`` fp16, or ``[T, K + 1]`` for ``kl_mass``,
the reference of every position of one token sequence, named by the sequence's hash; the metadata
name the safety tokens and the unit. Padding does not matter: only the real tokens are hashed, and
only they get values.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.huggingface.constraint.adapters import adapter_layers
from str_kernels.huggingface.constraint.reference_pass import reference_fold, safety_reference
from str_kernels.huggingface.constraint.sequences import Sequences, content_key
from str_kernels.huggingface.deferred.forward import inner_forward
from str_kernels.huggingface.deferred.head import (
    causal_lm,
    deferrable_head,
    find_head,
    validate_tokens,
)
from str_kernels.options import LossOptions, SafetyConstraint
from str_kernels.ranks import sharing
from str_kernels.tensor_files import SavedTensors, save_tensors
from str_kernels.tensor_rows import TensorRows, is_of_rows

SCHEMA = "str_kernels.reference_cache/1"

_CHANGED = "make it again: packing, truncation or the data changed since it was made."
_EVALUATING = (
    "make it from training and evaluation rows together, or use 'adapter_off': the model is in "
    "evaluation mode. If the row was among those, packing or truncation changed since."
)


def reference_unit(safety: SafetyConstraint) -> str:
    """The unit of this constraint's reference; ``"logprobs and rest"`` has one more column."""
    return {"logprob": "logprobs", "kl_mass": "logprobs and rest"}.get(safety.kind, "logits")


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
        name = f"reference={os.fspath(path)!r}"
        if not self.path.is_file():
            raise ValueError(
                f"{name}: no such file; make one with str-kernels cache or "
                "build_reference_cache, or use 'adapter_off'."
            )
        self._saved = (TensorRows if is_of_rows(path) else SavedTensors)(path, name)
        self.check(safety)

    def __deepcopy__(self, memo: dict) -> ReferenceCache:
        return self  # read only, and the open file cannot be copied

    def check(self, safety: SafetyConstraint) -> None:
        """Refuse a constraint that these are not the references of."""
        metadata = self._saved.metadata
        if metadata.get("schema") != SCHEMA:
            raise ValueError(
                f"reference={str(self.path)!r}: schema is {metadata.get('schema')!r}, "
                f"must be {SCHEMA!r}."
            )
        if tuple(self._saved.json("token_ids")) != safety.token_ids:
            raise ValueError(
                f"reference={str(self.path)!r}: was computed for other safety tokens; compute it "
                "again for these."
            )
        unit = metadata.get("unit")
        if unit != reference_unit(safety):
            raise ValueError(
                f"reference={str(self.path)!r}: holds {unit}, but kind={safety.kind!r} needs "
                f"{reference_unit(safety)}; compute it again with this kind."
            )

    def holds(self, token_ids: Sequence[int]) -> bool:
        """Whether there are references of this sequence, given without padding."""
        return content_key(token_ids) in self._saved.names

    def lookup(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """References ``[B, T, K]`` fp32 of a batch ``[B, T]``; zero on padding.

        Raises:
            ValueError: a sequence that is not in the cache (packed or cut differently).
        """
        return self.find(Sequences(input_ids, mask=attention_mask))

    def find(
        self, sequences: Sequences, *, places: Tensor | None = None, evaluating: bool = False
    ) -> Tensor:
        """As ``lookup``, for sequences that may be those of a decoder, or of an evaluation.

        Args:
            sequences: the batch.
            places: ``[B, t]``, the positions whose references are wanted; None: all.
            evaluating: whether the batch is of an evaluation, for the error.
        """
        found, ids = None, sequences.ids
        for row, (where, length, key) in enumerate(sequences.rows()):
            if key not in self._saved.names:
                raise ValueError(
                    f"reference={str(self.path)!r}: holds nothing for row {row} of this batch "
                    f"({length} tokens); {_EVALUATING if evaluating else _CHANGED}"
                )
            values, where = self._saved[key], where.cpu()
            if found is None:
                shape = (ids if places is None else places).shape
                found = torch.zeros(*shape, values.shape[-1])
            if places is None:
                found[row, where] = values.float()
                continue
            at = torch.full((ids.shape[1],), -1)  # which of the real tokens a position is
            at[where] = torch.arange(length)
            at = at[places[row].cpu()]
            found[row, at >= 0] = values[at[at >= 0]].float()
        return found.to(ids.device)


def save_reference_cache(
    path: str | os.PathLike, references: dict[str, Tensor], safety: SafetyConstraint
) -> None:
    """Write ``{content_key: [T, K]}`` as fp16; the file appears whole or not at all.

    Raises:
        ValueError: a value beyond the range of fp16.
    """
    metadata = {
        "schema": SCHEMA,
        "token_ids": json.dumps(list(safety.token_ids)),
        "unit": reference_unit(safety),
    }
    save_tensors(path, halves(references), metadata)


def halves(references: dict[str, Tensor]) -> dict[str, Tensor]:
    """The references in fp16 on the CPU, rounded by 2⁻¹¹ of their size.

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
    return tensors


def build_reference_cache(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    path: str | os.PathLike,
    safety: SafetyConstraint,
) -> int:
    """Compute the reference of every sequence once and save it for ``patch_model(reference=path)``.

    The references are fp16 on disk: 2·K bytes a token, rounded by 2⁻¹¹ of their size.

    Args:
        model: the aligned model, patched or not; trained adapters are disabled, and frozen ones
            that are active beside them stay.
        batches: dicts of ``input_ids [B, T]`` and perhaps ``attention_mask [B, T]``, as the trainer
            will see them; other arguments of the model's forward may be there. Labels are read for
            encoder-decoders alone, whose sequences are found by ``decoder_input_ids``, or by labels
            where those are not given, together with the encoder's ``input_ids``.
        path: the safetensors file to write.
        safety: the constraint of the run to come.

    Returns:
        How many sequences were stored.

    Raises:
        ValueError: no folder to write into, no batch, or one without the ids.
    """
    require_writable(Path(path))
    inner = causal_lm(model)
    head = find_head(inner)
    validate_tokens(safety.token_ids, head)
    references: dict[str, Tensor] = {}
    with deferrable_head(head):
        ranks = sharing()
        for found in ranks.in_order(
            batches, lambda batch: references_of(inner, _without_cache(inner, batch), safety)
        ):
            references.update(found if ranks.first else dict.fromkeys(found))
    if not references:
        raise ValueError("batches: there was no sequence, so there is nothing to save.")
    if ranks.first:
        save_reference_cache(path, references, safety)
    ranks.wait()
    return len(references)


def _without_cache(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a training forward: with a cache packed sequences would not be told apart.

    A Trainer sets ``config.use_cache=False`` too, but the model here may be as it was loaded.
    """
    takes = "use_cache" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False, **batch} if takes else dict(batch)


def references_of(
    model: nn.Module, arguments: dict[str, Tensor], safety: SafetyConstraint
) -> dict[str, Tensor]:
    """References ``[T, K]`` of the sequences of a batch, by the key of their content."""
    sequences = Sequences.of(model, arguments)
    if sequences.missing is not None:
        raise ValueError(
            f"batches: one has no {sequences.missing}, by which the cache is looked up."
        )
    ids, mask = sequences.ids, sequences.mask
    adapters = bool(adapter_layers(model))
    fold = reference_fold(model, inner_forward(model), arguments, adapters=adapters)
    real = torch.ones_like(ids) if mask is None else mask
    options = LossOptions(safety=safety, filter_eps=0.0)
    values = safety_reference(fold, real.reshape(-1) != 0, options).reshape(*ids.shape, -1)
    return {key: values[row, where].cpu() for row, (where, _, key) in enumerate(sequences.rows())}


def require_writable(path: Path) -> None:
    """Refuse a path that no file can be written to."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"path={str(path)!r}: must be a file in a folder that can be written to.")
