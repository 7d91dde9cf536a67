"""The fused loss inside Hugging Face causal language models: one patch, no code per model."""

from str_kernels.huggingface.cache import build_reference_cache
from str_kernels.huggingface.callback import SafetyLogCallback
from str_kernels.huggingface.deferred import DeferredLogits
from str_kernels.huggingface.install import patch_model, unpatch_model
from str_kernels.huggingface.patch import Patch

__all__ = [
    "DeferredLogits",
    "Patch",
    "SafetyLogCallback",
    "build_reference_cache",
    "patch_model",
    "unpatch_model",
]
