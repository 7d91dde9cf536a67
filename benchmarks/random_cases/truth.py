"""The fp64 truth of a case: the oracle's loss and gradients, and what the filter makes of them.

The loss of a filtered head is the oracle's. In its gradient ``∂lse/∂(HWᵀ + b)`` of a dead tile is
replaced by its mean over the tile; a tile is dead if it holds at most ε of the row's probability
outside the label's tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.random_cases.draw import Case
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.engine.tiles import LEAST_OPEN
from str_kernels.options import TILE, LossOptions
from str_kernels.oracle import DenseRows, dense_rows


@dataclass(frozen=True)
class Facts:
    """A case in fp64 with N rows: operands, logits ``[N, V]`` and everything made of them."""

    case: Case
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    options: LossOptions

    @staticmethod
    def of(case: Case) -> Facts:
        """Cast and flatten a case."""
        # under autocast both operands of the product are rounded, the bias is not
        hidden, weight = (
            case.leaves[n].to(case.dtype).double() for n in ("hidden_states", "weight")
        )
        bias = case.leaves["bias"].double() if "bias" in case.leaves else None
        names = LossOptions.__dataclass_fields__
        options = LossOptions(**{k: v for k, v in case.settings.items() if k in names})
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return Facts(case, hidden, weight, bias, case.labels.reshape(-1).long(), options)

    @cached_property
    def labelled(self) -> Tensor:
        """``[N]`` bool."""
        return self.labels != self.options.ignore_index

    @cached_property
    def is_label(self) -> Tensor:
        """``[N, V]`` bool."""
        tokens = torch.arange(len(self.weight))
        return (tokens == self.labels[:, None]) & self.labelled[:, None]

    @cached_property
    def scaled(self) -> Tensor:
        """``[N, V]``, the logits before the softcap."""
        products = self.hidden @ self.weight.T
        return self.options.logit_scale * (products if self.bias is None else products + self.bias)

    @cached_property
    def z(self) -> Tensor:
        """``[N, V]``, the logits."""
        cap = self.options.softcap
        return self.scaled if cap is None else cap * torch.tanh(self.scaled / cap)

    @cached_property
    def slope(self) -> Tensor:
        """``∂z/∂(HWᵀ + b)``."""
        cap, scale = self.options.softcap, self.options.logit_scale
        one = torch.ones_like(self.z)
        return scale * (one if cap is None else 1 - (self.z / cap).square())

    @cached_property
    def p(self) -> Tensor:
        """``[N, V]``, the probabilities."""
        return self.z.softmax(-1)

    @cached_property
    def upstream(self) -> Tensor:
        """``[N]``, by which each row's loss enters the total."""
        given, settings = self.case.upstream.double(), self.case.settings
        if settings["reduction"] == "none":
            return given.reshape(-1)
        count = 1.0
        if settings["reduction"] == "mean":
            items = self.case.constants["num_items_in_batch"]
            count = float(self.labelled.sum() if items is None else items)
        return (given / count if count else given * 0.0).expand(len(self.labels))

    @cached_property
    def weights(self) -> Tensor:
        """``[N]``, w of the constraint."""
        given = self.case.constants.get("position_weights")
        return (self.labelled if given is None else given.reshape(-1)).double()

    @cached_property
    def reference(self) -> Tensor | None:
        """``[N, K]`` or ``[K]``, that of the constraint."""
        given = self.case.constants.get("reference")
        if given is None:
            return None
        given = given.double()
        return given if given.dim() == 1 else given.reshape(-1, given.shape[-1])

    @cached_property
    def eps(self) -> float:
        """The filter's ε, as the package documents it."""
        eps, o, case = self.options.filter_eps, self.options, self.case
        if case.options["backend"] == "dense" or (o.softcap is not None and o.label_smoothing):
            return 0.0
        if eps == "auto":
            cheaper = o.screen not in ("auto", "exact")
            return DEFAULT_EPS if cheaper or case.constants.get("index") is not None else 0.0
        return eps

    @cached_property
    def member(self) -> Tensor:
        """``[V, T]``, 1 where a token belongs to a tile."""
        index = self.case.constants.get("index")
        order = torch.arange(len(self.weight)) if index is None else index.order
        tile = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) // TILE)
        return torch.nn.functional.one_hot(tile).double()

    @cached_property
    def of_label(self) -> Tensor:
        """``[N, T]`` bool, the label's tile."""
        return (self.is_label.double() @ self.member).bool()

    @cached_property
    def share(self) -> Tensor:
        """``[N, T]``, each tile's probability over the least that keeps it live; inf at labels."""
        mass = self.p @ self.member
        opened = mass.masked_fill(self.of_label, 0.0).sum(-1, keepdim=True)
        share = mass / (self.eps * opened.clamp(min=LEAST_OPEN)).clamp(min=1e-300)
        return share.masked_fill(self.of_label, torch.inf)

    def tokens(self, tiles: Tensor) -> Tensor:
        """Spread values of tiles ``[N, T]`` over their tokens: ``[N, V]``."""
        return tiles[:, self.member.argmax(-1)]

    def mean_of_tiles(self, values: Tensor) -> Tensor:
        """Replace ``[N, V]`` by the means of tiles."""
        return self.tokens((values @ self.member) / self.member.sum(0))

    @cached_property
    def alpha(self) -> Tensor:
        """``[N]``, the derivative of the total by the log-sum-exp, the constraint's part too."""
        lse = self.z.logsumexp(-1)
        alpha = torch.where(self.labelled, 1.0 + 2.0 * self.options.z_loss * lse, 0.0)
        safety = self.options.safety
        if safety is not None and safety.kind == "logprob":
            distance = self.z[:, list(safety.token_ids)] - lse[:, None] - self.reference
            omega = distance.new_tensor(safety.token_weights or [1.0] * distance.shape[1])
            pull = -2.0 * (omega * distance).mean(-1) * safety.strength * self.weights
            alpha = alpha + torch.where(self.weights > 0, pull, 0.0)
        return alpha * self.upstream


@dataclass(frozen=True)
class Truth:
    """The loss as it is returned, gradients by name, and the oracle's rows."""

    loss: Tensor
    gradients: dict[str, Tensor]
    rows: DenseRows


def truth_of(facts: Facts) -> Truth:
    """Compute the truth of a case."""
    case, options = facts.case, facts.options
    leaves = [x.clone().requires_grad_() for x in (facts.hidden, facts.weight)]
    bias = None if facts.bias is None else facts.bias.clone().requires_grad_()
    rows = dense_rows(
        *leaves,
        facts.labels,
        options,
        bias=bias,
        reference=facts.reference,
        position_weights=facts.weights if options.safety is not None else None,
    )
    each = rows.cross_entropy + rows.penalty
    total = (torch.where(facts.upstream == 0, 0.0, each) * facts.upstream).sum()
    named = dict(zip(("hidden_states", "weight"), leaves, strict=True))
    if bias is not None:
        named["bias"] = bias
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(named.items(), found, strict=True)
    }
    if facts.eps:
        by_lse = facts.p * facts.slope
        moved = (facts.mean_of_tiles(by_lse) - by_lse) * facts.alpha[:, None]
        moved = torch.where(facts.tokens(facts.share) > 1.0, 0.0, moved)
        gradients["hidden_states"] += moved @ facts.weight
        gradients["weight"] += moved.T @ facts.hidden
        if bias is not None:
            gradients["bias"] += moved.sum(0)
    loss = each.detach().reshape(case.labels.shape)
    if case.settings["reduction"] != "none":
        given = case.upstream.double()
        loss = total.detach() / given
    return Truth(loss, gradients, rows)
