"""The fused loss inside Hugging Face causal language models: one patch, no code per model."""

from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.huggingface.constraint.references import build_reference_cache
from str_kernels.huggingface.deferred.tensor import DeferredLogits
from str_kernels.huggingface.patch.callback import SafetyLogCallback
from str_kernels.huggingface.patch.install import patch_model, unpatch_model
from str_kernels.huggingface.patch.patch import Patch

__all__ = [
    "DeferredLogits",
    "FillingCache",
    "Patch",
    "SafetyLogCallback",
    "build_reference_cache",
    "patch_model",
    "unpatch_model",
]
