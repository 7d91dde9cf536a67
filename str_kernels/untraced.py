"""Terms of a split vocabulary in compiled code, which runs them eagerly.

A tracer does not follow what processes exchange, nor choices that they make together. Importing
this module imports torch's compiler, so it is imported in traced code alone.
"""

from __future__ import annotations

import torch

from str_kernels import split

split_terms = torch.compiler.disable(split.split_terms)
