"""Backends: who computes the row statistics and the gradients, and how one is chosen."""

from str_kernels.backends.torch import TorchBackend
from str_kernels.engine.contract import Backend

__all__ = ["Backend", "TorchBackend"]
