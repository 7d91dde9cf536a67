"""Every head that is measured has one interface: a name, why it cannot run here, and `run`.

Other projects' losses of a linear head are called as their own documentation or trainer does; each
takes ``hidden_states [N, D]``, ``weight [V, D]``, ``labels [N]`` and returns the mean loss.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from str_kernels.bench.inputs import Case
from str_kernels.functional import linear_cross_entropy
from str_kernels.version import versions


class Outcome(NamedTuple):
    """One forward and backward: gradients ``[N, D]`` and ``[V, D]``, and ``lse [N]`` if known."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor | None
    lse: Tensor | None


_CUTE = "nvidia-cutlass-dsl"
Loss = Callable[[Case, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contender:
    """One head."""

    name: str
    about: str
    loss: Loss  # computes the loss of a case with these leaves and, if it can, the lse
    package: str | None = None  # the distribution it comes from; None for ours
    compiled: bool = False  # whether it needs a C++ compiler on a CPU
    gpu: bool = False  # whether it needs a GPU
    cute: bool = False  # whether it needs NVIDIA's CuTe, and so a GPU of theirs

    def missing(self) -> str | None:
        """Return why it cannot run here; None if it can."""
        if self.gpu and not torch.cuda.is_available():
            return "needs a GPU"
        if self.package is not None and versions(self.package)[self.package] is None:
            return f"not installed (pip install {self.package})"
        if self.name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            return f"torch {torch.__version__} has none yet: since 2.13"
        if self.cute and versions(_CUTE)[_CUTE] is None:
            return f"not installed (pip install {_CUTE})"
        if self.cute and not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        if self.compiled and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            return "needs a C++ compiler"
        return None

    def run(self, case: Case, *, trainable: bool = False) -> Outcome:
        """Run forward and backward of a frozen or a trainable head."""
        hidden = case.hidden_states.detach().requires_grad_()
        weight = case.weight.detach().requires_grad_(trainable)
        loss, lse = self.loss(case, hidden, weight)
        leaves = [hidden, weight] if trainable else [hidden]
        d_hidden, *d_weight = torch.autograd.grad(loss, leaves)
        return Outcome(loss.detach(), d_hidden, d_weight[0] if trainable else None, lse)


def _ours(*, indexed: bool = True, constrained: bool = False, **settings: Any) -> Loss:
    def loss(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        chosen = dict(settings, index=case.index if indexed else None)
        if constrained:
            chosen["safety"], chosen["reference"] = case.usual_constraint
        total, parts = linear_cross_entropy(
            hidden, weight, case.labels, return_parts=True, **chosen
        )
        return total, parts.lse

    return loss


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


def liger_hopper(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call Liger's CuTe head of Hopper, whose backward makes the weight's gradient in any case."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as head

    return head.LigerFusedLinearCrossEntropySM90Function.apply(hidden_states, weight, labels)


def liger_scaled(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call Liger's other head of Hopper, which stores no logits and computes them twice."""
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as head

    return head.LigerFusedScaledCrossEntropySM90Function.apply(hidden_states, weight, labels).mean()


def quack(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call quack's chunked head, by the pipeline that it chooses for this GPU."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden_states, weight, labels)


def trl(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Call the head that TRL's trainers put on a model, in their tiles of 32,768 columns."""
    from trl.kernels import ChunkedLogProbFunction

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden_states, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",)
    )
    return -log_probs.mean()


def _peer(
    name: str, about: str, loss: Callable[..., Tensor], package: str, **flags: bool
) -> Contender:
    def loss_of(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        return loss(hidden, weight, case.labels), None

    return Contender(name, about, loss_of, package, **flags)


_ALL = (
    Contender("ours", "default settings with an index", _ours()),
    Contender("ours-str", "the same and 64 safety tokens", _ours(constrained=True)),
    Contender("ours-filtered", "screened in full precision", _ours(screen="exact")),
    Contender("ours-exact", "every logit exact", _ours(indexed=False, filter_eps=0.0)),
    _peer("transformers", "materialised logits", materialised, "transformers"),
    _peer("compiled", "transformers under torch.compile", compiled, "transformers", compiled=True),
    _peer("torch", "F.linear_cross_entropy, chunked", torch_chunked, "torch"),
    _peer("cce", "cut-cross-entropy", cce, "cut-cross-entropy", compiled=True),
    _peer("trl", "the head of TRL's trainers", trl, "trl"),
    _peer("liger", "Liger's fused head", liger, "liger-kernel", gpu=True),
    _peer("liger-hopper", "Liger's CuTe head", liger_hopper, "liger-kernel", cute=True),
    _peer("liger-scaled", "Liger's other CuTe head", liger_scaled, "liger-kernel", cute=True),
    _peer("quack", "quack's chunked head", quack, "quack-kernels", cute=True),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


def chosen_contenders(names: str | None) -> list[Contender]:
    """Return those named, comma-separated; None: all.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return list(CONTENDERS.values())
    chosen = []
    for name in map(str.strip, names.split(",")):
        if name not in CONTENDERS:
            raise ValueError(f"contenders={name!r}: must be of {', '.join(CONTENDERS)}.")
        chosen.append(CONTENDERS[name])
    return chosen
