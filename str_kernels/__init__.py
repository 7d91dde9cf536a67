"""Safety Token Regularization fused into the cross-entropy of a linear language-model head.

`linear_cross_entropy` is the operation. Importing this package does not import torch, transformers
or triton: each public name imports its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from str_kernels.options import SafetyConstraint
from str_kernels.version import __version__

if TYPE_CHECKING:
    from str_kernels.engine.shards import VocabularyShard
    from str_kernels.functional import LinearCrossEntropyLoss, LossParts, linear_cross_entropy
    from str_kernels.huggingface import SafetyLogCallback, patch_model, unpatch_model
    from str_kernels.huggingface.constraint.anchors import AnchoredCollator
    from str_kernels.planning import plan
    from str_kernels.probe.callback import SafetyProbe
    from str_kernels.safety.tokens import SafetyTokens
    from str_kernels.vocabulary import VocabularyIndex

_HOMES = {
    "AnchoredCollator": "str_kernels.huggingface.constraint.anchors",
    "LinearCrossEntropyLoss": "str_kernels.functional",
    "LossParts": "str_kernels.functional",
    "SafetyLogCallback": "str_kernels.huggingface",
    "SafetyProbe": "str_kernels.probe.callback",
    "SafetyTokens": "str_kernels.safety.tokens",
    "VocabularyIndex": "str_kernels.vocabulary",
    "VocabularyShard": "str_kernels.engine.shards",
    "linear_cross_entropy": "str_kernels.functional",
    "patch_model": "str_kernels.huggingface",
    "plan": "str_kernels.planning",
    "unpatch_model": "str_kernels.huggingface",
}

__all__ = [
    "AnchoredCollator",
    "LinearCrossEntropyLoss",
    "LossParts",
    "SafetyConstraint",
    "SafetyLogCallback",
    "SafetyProbe",
    "SafetyTokens",
    "VocabularyIndex",
    "VocabularyShard",
    "__version__",
    "linear_cross_entropy",
    "patch_model",
    "plan",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'str_kernels' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, whether imported yet or not."""
    return sorted(set(globals()) | set(_HOMES))
