"""Every head that is measured has one interface: a name, why it cannot run here, and `run`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.bench import peers
from str_kernels.bench.inputs import Case
from str_kernels.functional import linear_cross_entropy
from str_kernels.version import versions


class Outcome(NamedTuple):
    """One forward and backward: gradients ``[N, D]`` and ``[V, D]``, and ``lse [N]`` if known."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor | None
    lse: Tensor | None


Loss = Callable[[Case, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contender:
    """One head."""

    name: str
    about: str
    loss: Loss  # computes the loss of a case with these leaves and, if it can, the lse
    package: str | None = None  # the distribution it comes from; None for ours
    compiled: bool = False  # whether it needs a C++ compiler on a CPU

    def missing(self) -> str | None:
        """Return why it cannot run here; None if it can."""
        if self.package is not None and versions(self.package)[self.package] is None:
            return f"not installed (pip install {self.package})"
        if self.name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            return f"torch {torch.__version__} has none yet: since 2.13"
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
    _peer("transformers", "materialised logits", peers.materialised, "transformers"),
    _peer(
        "compiled",
        "transformers under torch.compile",
        peers.compiled,
        "transformers",
        compiled=True,
    ),
    _peer("torch", "F.linear_cross_entropy, chunked", peers.torch_chunked, "torch"),
    _peer("cce", "cut-cross-entropy", peers.cce, "cut-cross-entropy", compiled=True),
    _peer("trl", "the head of TRL's trainers", peers.trl, "trl"),
    _peer("liger", "Liger's fused head", peers.liger, "liger-kernel"),
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
