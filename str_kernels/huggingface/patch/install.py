"""`patch_model` and `unpatch_model`: check everything, then install; take it off again."""

from __future__ import annotations

import os
from typing import Any, Literal

from torch import Tensor, nn

from str_kernels.backends.selection import select_backend
from str_kernels.engine.contract import Backend
from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.huggingface.constraint.share import Sharing
from str_kernels.huggingface.deferred.forward import PATCH
from str_kernels.huggingface.deferred.head import causal_lm, find_head, find_patch, validate_tokens
from str_kernels.huggingface.patch.callback import TrainerLogs
from str_kernels.huggingface.patch.context import Reference
from str_kernels.huggingface.patch.filtering import Index
from str_kernels.huggingface.patch.patch import Patch
from str_kernels.huggingface.patch.verify import verify_patch
from str_kernels.options import LossOptions, SafetyConstraint, Screen, removed
from str_kernels.settings import ConstraintSettings, Positions, validate_positions
from str_kernels.vocabulary import VocabularyIndex


def patch_model(
    model: nn.Module,
    safety: SafetyConstraint | None = None,
    *,
    reference: str | os.PathLike | FillingCache = ConstraintSettings.reference,
    positions: Positions = ConstraintSettings.positions,
    share: float = ConstraintSettings.share,
    share_seed: int = 0,
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
    ``outputs.logits`` (real logits once read). Under ``torch.func`` and forward-mode AD the model
    computes its own loss, which a constraint cannot join; second derivatives need
    ``backend="dense"``. In eval mode the loss is the same. A model inside
    ``torch.compile`` runs eagerly; compile its body (``model.model.compile()``) instead.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not; only this instance is touched.
        safety: the constraint, or None for the fused cross-entropy alone.
        reference: ``"adapter_off"`` (the same model with its trained adapters disabled, one no-grad
            pass a step), the path of a cache that ``build_reference_cache`` wrote, or a
            ``FillingCache``, which computes each row once, when it is first met. Adapters that
            are active and have no trained parameter stay on, so that one that carries the alignment
            is part of the reference (``is_trainable=False``); one that is loaded and trained on is
            not, and the first penalty, which is not 0 then, is said. The forwards check that there
            is an adapter to switch off and that nothing else is trained, for PEFT may come after
            the patch.
        positions: ``"all"`` (prompt too, padding not), ``"labels"``, or k, the first k labelled
            positions of each sequence; the weights w of a sequence always sum to its labels. A
            batch may carry weights w of its own beside its labels, ``position_weights [B, T]``
            floating point, of the logits at each position: for rows that are constrained and not
            learned, such as those that ``AnchoredCollator`` adds. A Trainer keeps such a column
            of a data set only with ``remove_unused_columns=False``. In an encoder-decoder the
            positions are the decoder's; without ``decoder_attention_mask`` the padding of a row
            begins after its last label.
        share: the share of the batch's rows that is constrained in training mode, in (0, 1]. They
            are drawn for each forward, the reference pass runs on them alone, and their weights are
            divided by the share. A packed row is drawn as a whole.
        share_seed: determines, with the trainer's step (`SafetyLogCallback`) and the forwards since
            it began, which rows are drawn.
        filter_eps: as in ``linear_cross_entropy``.
        screen: as in ``linear_cross_entropy``.
        index: as in ``linear_cross_entropy``; ``"auto"`` makes one from the first training batch
            if the head is frozen and has 8,192 rows or more.
        backend: as in ``linear_cross_entropy``.
        check_accuracy_every: compare a sample of rows with the exact pass at the first training
            loss and every so many later; where the filter errs more than a bf16 head, fall back to
            the exact screen, then to the exact pass, and warn. None: never.
        verify: try the patch on this very model first: 16 tokens go forward without and with it, in
            evaluation mode, and loss, gradients at the head and logits are compared; the model is
            restored afterwards. A model that cannot run so (on the meta device, sharded, or with
            other inputs) is patched without the check, with a warning. ``patch.verification`` is
            the result.

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
    sharing = _sharing(share, share_seed, safety)
    options = LossOptions(safety=safety, filter_eps=filter_eps, screen=screen)
    select_backend(backend, next(head.parameters()).device)
    _validate_index(index)
    reference = _validate_reference(reference, safety, head)
    verification = verify_patch(inner, head, backend) if verify else None
    patch = Patch(
        inner,
        head,
        options,
        reference=reference,
        positions=positions,
        sharing=sharing,
        index=index,
        backend=backend,
        check_accuracy_every=check_accuracy_every,
        verification=verification,
        trainer_logs=TrainerLogs.shared(),
    )
    if verification is not None and verification.skipped:
        patch.notices.warn_unverified(verification.skipped)
    return patch


def unpatch_model(model: nn.Module) -> None:
    """Remove the patch, with every hook that it registered.

    The hook that counts optimizer steps stays while another patch needs it, or outputs of this one.

    Raises:
        ValueError: the model is not patched.
    """
    patch = find_patch(causal_lm(model))
    if patch is None:
        raise ValueError(f"model={type(model).__name__}: is not patched.")
    patch.unpatch()


def _sharing(share: Any, seed: Any, safety: SafetyConstraint | None) -> Sharing:
    if safety is None and share != ConstraintSettings.share:
        raise ValueError(f"share={share!r} was given without safety: pass a SafetyConstraint too.")
    return Sharing(share, seed)


def _validate_index(index: Any) -> None:
    if index is not None and index != "auto" and not isinstance(index, VocabularyIndex):
        raise ValueError(f"index={index!r}: must be a VocabularyIndex, 'auto' or None.")


def _validate_reference(
    reference: Any, safety: SafetyConstraint | None, head: nn.Module
) -> Reference:
    if isinstance(reference, tuple | Tensor) or reference == "static":
        raise ValueError(removed("a fixed reference tensor"))
    if not isinstance(reference, str | os.PathLike | FillingCache):
        raise ValueError(
            f"reference={reference!r}: must be 'adapter_off', the path of a cache file, or a "
            "FillingCache."
        )
    if safety is None:
        if reference != "adapter_off":
            raise ValueError("reference was given without safety: pass a SafetyConstraint too.")
        return reference
    validate_tokens(safety.token_ids, head)
    if isinstance(reference, FillingCache):
        reference.check(safety)
        return reference
    return reference if reference == "adapter_off" else ReferenceCache(reference, safety)
