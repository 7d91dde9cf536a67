"""The GPU backend: Triton kernels for CUDA and ROCm. Importing this module imports triton."""

from str_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
