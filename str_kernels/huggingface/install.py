"""`patch_model` and `unpatch_model`: check everything, then install; take it off again."""

from __future__ import annotations

import os
from typing import Any, Literal

from torch import Tensor, nn

from str_kernels.backends.selection import select_backend
from str_kernels.engine.contract import Backend
from str_kernels.huggingface.head import find_head, vocabulary_size
from str_kernels.huggingface.patch import PATCH, Index, Patch, Reference
from str_kernels.huggingface.positions import Positions, validate_positions
from str_kernels.huggingface.verify import verify_patch
from str_kernels.options import LossOptions, SafetyConstraint, Screen, removed
from str_kernels.safety.references import ReferenceCache
from str_kernels.vocabulary import VocabularyIndex


def patch_model(
    model: nn.Module,
    safety: SafetyConstraint | None = None,
    *,
    reference: str | os.PathLike = "adapter_off",
    positions: Positions = "all",
    filter_eps: float | Literal["auto"] = "auto",
    screen: Screen = "auto",
    index: Index = "auto",
    backend: str | Backend = "auto",
    check_accuracy_every: int | None = None,
    verify: bool = True,
) -> Patch:
    """Make one causal language model compute its loss fused, with the safety constraint.

    ::

        loss = (Σ CE + strength · Σ w · C) / n

    as ``linear_cross_entropy`` defines it; n is what the model itself would divide by, so labels,
    ``shift_labels`` and ``num_items_in_batch`` mean what they mean to transformers. Nothing else
    changes: the model's ``forward``, its signature, ``generate``, ``save_pretrained`` and
    ``outputs.logits`` (real logits once read). In eval mode the loss is the same. A model inside
    ``torch.compile`` runs eagerly; compile its body (``model.model.compile()``) instead.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not; only this instance is touched.
        safety: the constraint, or None for the fused cross-entropy alone.
        reference: ``"adapter_off"`` (the same model with its adapters disabled, one no-grad pass a
            step), or the path of a cache that ``build_reference_cache`` wrote. The forwards check
            that there is an adapter to switch off and that nothing else is trained, for PEFT may
            come after the patch.
        positions: ``"all"`` (prompt too, padding not), ``"labels"``, or k, the first k labelled
            positions of each sequence; the weights w of a sequence always sum to its labels. A
            batch may carry weights w of its own beside its labels, ``position_weights [B, T]``
            floating point, of the logits at each position: for rows that are held without being
            learned from, as ``AnchoredCollator`` joins them. A Trainer keeps such a column of a
            data set with ``remove_unused_columns=False`` only.
        filter_eps: as in ``linear_cross_entropy``.
        screen: as in ``linear_cross_entropy``.
        index: as in ``linear_cross_entropy``; ``"auto"`` makes one from the first training batch
            if the head is frozen and has 8,192 rows or more.
        backend: as in ``linear_cross_entropy``.
        check_accuracy_every: compare a sample of rows with the exact pass at the first training
            loss and every so many later; where the filter errs more than a bf16 head, fall back to
            the exact screen, then to the exact pass, and warn. None: never.
        verify: try the patch on this very model first: 16 tokens forward without and with it, in
            evaluation mode, loss, gradients at the head and logits compared; everything is left as
            it was. A model that cannot run so (on the meta device, sharded, in want of other
            inputs) is patched untried, which is said. ``patch.verification`` holds the finding.

    Returns:
        A ``Patch``; ``with patch_model(model) as patch: ...`` unpatches on leaving.

    Raises:
        ValueError: patched already, no output head, a head that cannot be fused (quantised,
            sharded, on the meta device), an unknown reference, position, backend or screen, a token
            id beyond the head, a model that computes something else once patched. In a forward: no
            adapter to switch off, a merged one, or trained parameters outside the adapters; a model
            whose loss the constraint cannot join.
    """
    inner = causal_lm(model)
    if PATCH in inner.__dict__:
        raise ValueError(
            f"model={type(inner).__name__}: is patched already; call unpatch_model(model) first."
        )
    head = find_head(inner)
    validate_positions(positions)
    options = LossOptions(safety=safety, filter_eps=filter_eps, screen=screen)
    select_backend(backend, next(head.parameters()).device)
    _validate_index(index)
    reference = _validate_reference(reference, safety, vocabulary_size(head))
    verification = verify_patch(inner, backend) if verify else None
    patch = Patch(
        inner,
        options,
        reference=reference,
        positions=positions,
        index=index,
        backend=backend,
        check_accuracy_every=check_accuracy_every,
        verification=verification,
    )
    if verification is not None and verification.skipped:
        patch.notices.say_unverified(verification.skipped)
    return patch


def unpatch_model(model: nn.Module) -> None:
    """Take the patch off again; nothing of it stays.

    Raises:
        ValueError: the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise ValueError(f"model={type(model).__name__}: is not patched.")
    patch.unpatch()


def find_patch(model: nn.Module) -> Patch | None:
    """The patch that this model carries."""
    return causal_lm(model).__dict__.get(PATCH)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, or the model itself.

    Raises:
        ValueError: not a transformers model, or wrapped for several devices already.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"model={type(model).__name__}: patch the model before it is wrapped.")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "get_output_embeddings"):
        raise ValueError(
            f"model is a {type(inner).__name__}: must be a transformers causal language model."
        )
    return inner


def _validate_index(index: Any) -> None:
    if index is not None and index != "auto" and not isinstance(index, VocabularyIndex):
        raise ValueError(f"index={index!r}: must be a VocabularyIndex, 'auto' or None.")


def _validate_reference(
    reference: Any, safety: SafetyConstraint | None, vocab_size: int
) -> Reference:
    if isinstance(reference, tuple | Tensor) or reference == "static":
        raise ValueError(removed("a fixed reference tensor"))
    if not isinstance(reference, str | os.PathLike):
        raise ValueError(
            f"reference={reference!r}: must be 'adapter_off' or the path of a cache file."
        )
    if safety is None:
        if reference != "adapter_off":
            raise ValueError("reference was given without safety: pass a SafetyConstraint too.")
        return reference
    largest = max(safety.token_ids)
    if largest >= vocab_size:
        raise ValueError(
            f"safety.token_ids holds {largest}: the model's head has {vocab_size} rows, 0 to "
            f"{vocab_size - 1}; were the tokens identified with another tokenizer?"
        )
    return reference if reference == "adapter_off" else ReferenceCache(reference, safety)
