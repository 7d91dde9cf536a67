"""The fused loss inside Hugging Face causal language models: one patch, no code per model."""

from str_kernels.huggingface.callback import SafetyLogCallback
from str_kernels.huggingface.deferred import DeferredLogits
from str_kernels.huggingface.patch import Patch, patch_model, unpatch_model

__all__ = [
    "DeferredLogits",
    "Patch",
    "SafetyLogCallback",
    "patch_model",
    "unpatch_model",
]
