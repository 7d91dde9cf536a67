"""Safety Token Regularization fused into the cross-entropy of a linear language-model head.

`linear_cross_entropy` is the operation. Importing this package imports neither triton nor
transformers.
"""

from str_kernels.functional import LinearCrossEntropyLoss, LossParts, linear_cross_entropy
from str_kernels.options import SafetyConstraint
from str_kernels.version import __version__

__all__ = [
    "LinearCrossEntropyLoss",
    "LossParts",
    "SafetyConstraint",
    "__version__",
    "linear_cross_entropy",
]
