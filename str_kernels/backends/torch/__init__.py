"""The portable backend: blocked torch calls on any device, within a byte budget."""

from str_kernels.backends.torch.backend import TorchBackend

__all__ = ["TorchBackend"]
