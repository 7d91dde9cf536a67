"""The GPU backend runs Triton kernels on CUDA and ROCm. Importing this module imports triton."""

from str_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
