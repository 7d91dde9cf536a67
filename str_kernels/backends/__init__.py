"""Backends: who computes the row statistics and the gradients, and how one is chosen."""

from str_kernels.backends.contract import Backend
from str_kernels.backends.torch_blocked import TorchBlocked

__all__ = ["Backend", "TorchBlocked"]
