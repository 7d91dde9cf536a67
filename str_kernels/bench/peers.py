"""Call other projects' losses of a linear head as their own documentation or trainer does.

Each takes ``hidden_states [N, D]``, ``weight [V, D]``, ``labels [N]`` and returns the mean loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def materialised(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call transformers' materialised head: logits in the model's dtype, the loss in fp32."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = F.linear(hidden_states, weight)
    return ForCausalLMLoss(logits, None, vocab_size=len(weight), shift_labels=labels)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(materialised)


def compiled(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call the same under ``torch.compile``."""
    return _compiled()(hidden_states, weight, labels)


def torch_chunked(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call PyTorch's own, with the chunks it chooses for this device and dtype."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_states, weight, labels, options=options)


def cce(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call CCE: its Triton kernels on a GPU, its compiled form elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden_states.is_cuda else "torch_compile"
    return linear_cross_entropy(hidden_states, weight, labels, impl=impl)


def liger(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden_states, labels)


def trl(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call the head that TRL's trainers put on a model, in their tiles of 32,768 columns."""
    from trl.kernels import ChunkedLogProbFunction

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden_states, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",)
    )
    return -log_probs.mean()
