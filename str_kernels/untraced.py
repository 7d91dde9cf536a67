"""Terms of a split vocabulary in compiled code, which runs them eagerly.

A tracer does not follow what processes exchange, nor choices that they make together. Importing
this module imports torch's compiler, so it is imported where a vocabulary is split.
"""

from __future__ import annotations

import torch

from str_kernels.engine.contract import Head, RowInputs, RowTerms
from str_kernels.engine.shards import VocabularyShard
from str_kernels.options import LossOptions
from str_kernels.split import own_part
from str_kernels.terms import row_terms


@torch.compiler.disable
def split_terms(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    *,
    shard: VocabularyShard | None,
    **settings: object,
) -> RowTerms:
    """Compute ``row_terms`` of a ``DTensor``'s part, or of a shard that is given."""
    head, shard = own_part(head, shard)
    return row_terms(head, inputs, options, shard=shard, **settings)
