"""`LossContext`: everything of a patch and of one forward that a loss is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from str_kernels.engine.contract import Backend
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.huggingface.constraint.share import Drawn
from str_kernels.huggingface.constraint.splits import Split
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.patch.filtering import IndexSource
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.huggingface.patch.processes import ALONE, Together
from str_kernels.huggingface.trl import TokenTerms
from str_kernels.options import LossOptions
from str_kernels.settings import Positions

Reference = Literal["adapter_off"] | ReferenceCache


@dataclass(frozen=True)
class LossContext:
    """What the loss of one forward is computed from, besides the logits and their targets.

    Attributes:
        model: the name of the model's class, for errors.
        options: of the patch.
        reference: of the patch.
        positions: of the patch.
        backend: of the patch.
        index: gives the vocabulary index for a call of the head.
        notices: where warnings go.
        sequences: the tokens of the head's rows, as the arguments of the forward tell them.
        evaluating: whether the model is in evaluation mode.
        aligned: the reference pass of this batch, if there was one.
        position_weights: ``[B, T]``, the weight of each position's logits in the constraint,
            instead of ``positions``; None: those.
        together: the processes that make the same forwards.
        split: the processes that have the other parts of these sequences; None: they are whole.
        tokens: receives the terms of every token, if TRL asks for them.
        drawn: the rows that are constrained; None: all.
    """

    model: str
    options: LossOptions
    reference: Reference
    positions: Positions
    backend: str | Backend
    index: IndexSource
    notices: Notices
    sequences: Sequences = field(default_factory=Sequences)
    evaluating: bool = False
    aligned: Fold | None = None
    position_weights: Tensor | None = None
    together: Together = ALONE
    split: Split | None = None
    tokens: TokenTerms | None = None
    drawn: Drawn | None = None
