"""Levers that trade time for memory at long contexts, for any transformers model.

Importing this package does not import torch.
"""

from str_kernels.levers.long_context import PLACES, LongContext

__all__ = ["PLACES", "LongContext"]
