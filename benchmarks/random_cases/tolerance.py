"""How far a case may be off: a bound for every number, to first order in the roundings.

A logit is a sum of D products in fp32 (fp64 for fp64 operands), so it is off by ``(4 + 3√D) u
Σ|h||w|``, u the unit roundoff. From there errors go on as derivatives say: to probabilities, terms
of the loss, gradients of logits, and, by the absolute values of what is multiplied, to gradients of
operands, which are rounded to the operands' dtype: of 16 bits three times (probabilities, the row
gradient that is kept, the result). With a filter the masses of dead tiles have the errors of the
screen's logits, and where a tile's mass is so near to ε that these decide, either answer is right.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from benchmarks.random_cases.truth import Facts
from str_kernels.backends.torch import TorchBackend

_TINY = {torch.float16: 2.0**-24}  # below these numbers a dtype has no digits
_SUM = 16.0  # roundings of a sum of up to a thousand terms
_LOG_MASS = 64.0  # nats, as large as which the logarithm of a screened mass may be
_HALVES = (torch.float16, torch.bfloat16)


class Bounds:
    """Bounds ``[N, V]``, ``[N]``, and those of loss and gradients."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.options = facts, facts.options
        dtype = facts.case.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # in fp64 the truth is rounded as much
        self.dtype, self.unit = dtype, torch.finfo(wide).eps / (1 if wide == torch.float64 else 2)
        leaves = getattr(torch, facts.case.options["dtype"])  # of another dtype under autocast
        self.of_dtype = max(torch.finfo(dtype).eps, torch.finfo(leaves).eps) / 2
        self.tiny = max(_TINY.get(dtype, 1e-37), _TINY.get(leaves, 1e-37))
        self.dense = facts.case.options["backend"] == "dense"

    @cached_property
    def sizes(self) -> Tensor:
        """``scale · (Σ|h||w| + |b|)``; infinite logits are exact."""
        facts = self.facts
        sizes = facts.hidden.abs() @ facts.weight.abs().T
        if facts.bias is not None:
            sizes = sizes + facts.bias.abs()
        sizes = sizes * abs(self.options.logit_scale)
        return torch.where(sizes.isinf(), 0.0, sizes)

    def _of_logits(self, error: Tensor) -> Tensor:
        cap = self.options.softcap
        if cap is None:
            return error
        # the steepest place that the error reaches
        near = (self.facts.scaled.abs() - error).clamp(min=0.0)
        error = error * (1 - torch.tanh(near / cap).square()) + 8 * self.unit * self.facts.z.abs()
        few = self.facts.case.options["backend"] == "triton" and cap <= 64
        return error + 4 * self.unit * cap if few else error

    @cached_property
    def z(self) -> Tensor:
        """``[N, V]``, of a logit."""
        root = self.facts.hidden.shape[1] ** 0.5
        units = (4 + 3 * root) * self.unit
        if self.dense and self.facts.case.options["autocast"]:
            units += self.of_dtype  # W is not rounded there
        return self._of_logits(units * self.sizes)

    @cached_property
    def screened(self) -> Tensor:
        """The error of a screened logit."""
        facts, screen, rounded = self.facts, self._screen(), self.z
        if screen in ("bf16", "exact") and (screen == "bf16" or self.dtype in _HALVES):
            # operands are rounded, and a CPU's products of 16 bits are so too
            unit = 2.0**-9 if screen == "bf16" else self.of_dtype
            return self._of_logits(4 * unit * self.sizes) + rounded
        if screen == "int8":
            # 127 steps up to a row's maximum, rounded to the nearest: a step/√12 off, five sigma
            hidden, weight = facts.hidden, facts.weight
            step = hidden.abs().amax(-1, keepdim=True) * weight.norm(dim=-1)
            step = step + hidden.norm(dim=-1, keepdim=True) * weight.abs().amax(-1)
            return self._of_logits(abs(self.options.logit_scale) * step / 60) + rounded
        if screen == "fp8":
            # three bits: 2^-4 of a number, spread evenly, for both; five sigma
            squares = facts.hidden.square() @ facts.weight.square().T
            scale = abs(self.options.logit_scale)
            return self._of_logits(0.26 * scale * squares.sqrt() + rounded) + rounded
        return rounded

    def _screen(self) -> str:
        facts = self.facts
        if self.options.screen != "auto" or facts.case.options["backend"] == "triton":
            return "exact" if self.options.screen == "auto" else self.options.screen
        rows = int(facts.labelled.sum())
        return TorchBackend().auto_screen(self.dtype, facts.weight.device, rows)

    @cached_property
    def tile(self) -> Tensor:
        """``[N, T]``, the relative error of a screened mass."""
        mass = (self.facts.p @ self.facts.member).clamp(min=1e-300)
        mean = (self.facts.p * self.screened) @ self.facts.member / mass
        return torch.expm1(mean.clamp(max=30.0)) + (_SUM + _LOG_MASS) * self.unit

    @cached_property
    def unsure(self) -> Tensor:
        """``[N, T]`` bool, the pairs that rounding makes live or dead."""
        if not self.facts.eps:
            return torch.zeros_like(self.tile, dtype=torch.bool)
        factor = 2 * (self.tile + self.tile.amax(-1, keepdim=True)) + 1e-9
        share = self.facts.share
        return (share >= 1 / (1 + factor)) & (share <= 1 + factor)

    @cached_property
    def maybe_dead(self) -> Tensor:
        """``[N, V]`` bool, the tokens of tiles that may be dead."""
        if not self.facts.eps:
            return torch.zeros_like(self.facts.z, dtype=torch.bool)
        return self.facts.tokens((self.facts.share <= 1.0) | self.unsure)

    @cached_property
    def lse_relative(self) -> Tensor:
        """``[N]``, the error of the log-sum-exp beside its own rounding."""
        facts = self.facts
        each = torch.where(self.maybe_dead, facts.tokens(self.tile), self.z)
        return (facts.p * each).sum(-1) + _SUM * self.unit

    @cached_property
    def lse(self) -> Tensor:
        """``[N]``, of the log-sum-exp as it is returned."""
        return self.lse_relative + 2 * self.unit * self.facts.z.logsumexp(-1).abs()

    @cached_property
    def p(self) -> Tensor:
        """``[N, V]``, of live probabilities; those of dead tiles are off by their masses'."""
        facts = self.facts
        below = facts.z - facts.z.logsumexp(-1, keepdim=True)
        below = torch.where(below.isinf(), 0.0, below)
        error = self.z + self.lse_relative[:, None]
        error = torch.expm1(error.clamp(max=30.0)) + (4 - 2 * below) * self.unit
        dead = facts.tokens(self.tile) + self.lse_relative[:, None]
        return facts.p * torch.where(self.maybe_dead, torch.maximum(error, dead), error)

    @cached_property
    def rows(self) -> Tensor:
        """``[N]``, of each row's loss."""
        facts, options, unit = self.facts, self.options, self.unit
        lse = facts.z.logsumexp(-1)
        own = facts.z.where(facts.is_label, torch.zeros(())).sum(-1)
        of_own = self.z.where(facts.is_label, torch.zeros(())).sum(-1)
        loss = lse - own
        opened = -torch.expm1(-loss)
        error = opened * (of_own + self.lse_relative / opened.clamp(min=1e-30).clamp(max=1.0))
        others = (self.p * ~facts.is_label).sum(-1)
        error = others + opened * of_own + _SUM * unit * (opened + loss)
        if self.dense:
            error = error + 4 * unit
        if options.label_smoothing:
            apart = (facts.z - own[:, None]).abs().mean(-1)
            spread = self.z.mean(-1) + of_own + _SUM * unit * apart
            if self.dense:
                spread = spread + self.lse_relative + 4 * unit * lse.abs()
            error = error + options.label_smoothing * spread
        # the truth's own: in fp64 a loss below its unit is 0
        error = error + 2.0**-50 * (1 + lse.abs())
        error = error + options.z_loss * (2 * lse.abs() * self.lse + 4 * unit * lse.square())
        error = torch.where(facts.labelled, error, 0.0)
        return error + self._penalty

    @cached_property
    def _distance(self) -> tuple[Tensor, Tensor]:
        """Of ``z - r`` or ``z - lse - r`` ``[N, K]``: its size and its error."""
        facts, ids = self.facts, list(self.options.safety.token_ids)
        values, error = facts.z[:, ids], self.z[:, ids]
        if self.options.safety.kind == "logprob":
            values = values - facts.z.logsumexp(-1, keepdim=True)
            error = error + self.lse_relative[:, None]
        error = error + 2 * self.unit * (values.abs() + facts.reference.abs())
        return (values - facts.reference).abs(), error

    @property
    def _omega(self) -> Tensor:
        safety = self.options.safety
        return self.facts.z.new_tensor(safety.token_weights or [1.0] * len(safety.token_ids))

    @cached_property
    def _kl(self) -> tuple[Tensor, Tensor]:
        """Of the tokens' own ``log p`` ``[N, K]``: the distances from ``log q``, and the errors."""
        facts, safety = self.facts, self.options.safety
        some = self._omega > 0
        ids = torch.tensor(safety.token_ids)[some]
        tau, logs = safety.temperature, self._omega[some].log()
        z, r = facts.z[:, ids], facts.reference[..., some].expand(len(facts.z), -1)
        log_p, log_q = ((x / tau + logs).log_softmax(-1) for x in (z, r))
        size = log_p.abs() + log_q.abs() + (z.amax(-1, keepdim=True) - z) / tau
        error = self.z[:, ids] / tau
        error = error + (log_p.exp() * error).sum(-1, keepdim=True) + self.unit * (8 + 4 * size)
        self.kl_p, self.kl_q, self.kl_ids = log_p.exp(), log_q.exp(), ids
        return (log_q - log_p).abs(), error

    @cached_property
    def _penalty(self) -> Tensor:
        safety, facts = self.options.safety, self.facts
        if safety is None:
            return torch.zeros(len(facts.labels), dtype=torch.float64)
        if safety.kind == "kl":
            distance, error = self._kl
            moved = (self.kl_p - self.kl_q).abs() * error + self.unit * 8 * self.kl_q * distance
            # log p and log q of all tokens are off by their own roundings too
            moved = moved + self.kl_q * self.unit * (8 + 4 * distance)
            cost = safety.temperature**2 * moved.sum(-1)
        else:
            distance, error = self._distance
            off = 2 * distance * error + error**2 + _SUM * self.unit * distance**2
            cost = (self._omega * off).mean(-1)
        return torch.where(facts.weights > 0, safety.strength * facts.weights * cost, 0.0)

    @cached_property
    def _by_logits(self) -> tuple[Tensor, Tensor]:
        """Of the gradient by ``HWᵀ + b`` ``[N, V]``: the sum of absolute terms, and the error."""
        facts, options, unit = self.facts, self.options, self.unit
        alpha = facts.alpha.abs()
        upstream = torch.where(facts.labelled, facts.upstream, 0.0).abs()
        lse = facts.z.logsumexp(-1).abs()
        opened = (facts.p * ~facts.is_label).sum(-1)
        ours = (self.p * ~facts.is_label).sum(-1)
        rest = (facts.alpha - facts.upstream * (1 - options.label_smoothing)).abs()
        size = alpha[:, None] * facts.p.masked_fill(facts.is_label, 0.0)
        size = torch.where(facts.is_label, (alpha * opened + rest)[:, None], size)
        error = alpha[:, None] * torch.where(facts.is_label, ours[:, None], self.p)
        of_alpha = upstream * 2 * options.z_loss * (self.lse + 2 * unit * lse)
        if options.z_loss or options.label_smoothing or options.safety is not None or self.dense:
            of_alpha = of_alpha + 4 * unit * (alpha + upstream)
        # the truth's own: it takes 1 from a probability
        of_alpha = of_alpha + 2.0**-50 * (alpha + upstream)
        error = error + of_alpha[:, None] * torch.where(facts.is_label, 1.0, facts.p)
        if options.label_smoothing:
            size = size + (upstream * options.label_smoothing / len(facts.weight))[:, None]
        if options.safety is not None:
            self._add_constraint(size, error)
        of_slope = torch.zeros_like(error)
        if options.softcap is not None:
            bounded = facts.z.abs()
            of_slope = 2 * bounded / options.softcap**2 * self.z + 4 * unit
        scale = abs(options.logit_scale)
        error = error * facts.slope.abs() + size * (
            of_slope * scale + _SUM * unit * facts.slope.abs()
        )
        size = size * facts.slope.abs()
        if facts.eps:
            by_lse = facts.p * facts.slope
            moved = (facts.mean_of_tiles(by_lse) - by_lse).abs() * alpha[:, None]
            spread = facts.mean_of_tiles(by_lse.abs()) * alpha[:, None]
            size = size + torch.where(self.maybe_dead, spread, 0.0)
            of_tile = facts.tokens(self.tile) + self.lse_relative[:, None]
            error = error + torch.where(self.maybe_dead, spread * of_tile, 0.0)
            if options.softcap is not None:  # the mean slope of screened logits
                change = 2 * facts.z.abs() / options.softcap**2 * self.screened * scale
                change = facts.mean_of_tiles(facts.p * change) * alpha[:, None]
                error = error + torch.where(self.maybe_dead, change, 0.0)
            error = error + torch.where(facts.tokens(self.unsure), moved, 0.0)
        return size, error

    def _add_constraint(self, size: Tensor, error: Tensor) -> None:
        """Add the constraint's part at the safety tokens, in place."""
        facts, safety = self.facts, self.options.safety
        factor = torch.where(facts.weights > 0, safety.strength * facts.weights, 0.0)
        factor = (factor * facts.upstream).abs()[:, None]
        if safety.kind == "kl":
            _, off = self._kl
            off = safety.temperature * ((self.kl_p * off) + 8 * self.unit * (self.kl_p + self.kl_q))
            each = safety.temperature * (self.kl_p + self.kl_q)
            ids = self.kl_ids
        else:
            distance, off = self._distance
            each, off = (2 * self._omega / len(self._omega) * x for x in (distance, off))
            ids = torch.tensor(safety.token_ids)
            if safety.kind == "logprob":
                error += (factor * off).sum(-1, keepdim=True) * facts.p
                size += (factor * each).sum(-1, keepdim=True) * facts.p
        size.index_add_(1, ids, factor * each)
        error.index_add_(1, ids, factor * off)

    def gradients(self) -> dict[str, Tensor]:
        """Bounds of the gradients, in their shapes with N rows."""
        facts = self.facts
        size, error = self._by_logits
        if self.of_dtype > 2.0**-20:
            error = error + 3 * self.of_dtype * size
        # fp16 has few digits far below the largest gradient of a block
        floor = self.tiny * size.max() if self.dtype == torch.float16 and size.numel() else 0.0
        rounds = (_SUM + len(facts.labels) ** 0.5) * self.unit + self.of_dtype
        # a probability below fp32's range is 0, however large the number that multiplies it
        off = error + rounds * size + 1e-37 * facts.alpha.abs()[:, None]
        along = off
        if self.options.label_smoothing:  # equal terms, whose roundings do not average out
            along = off + len(facts.weight) * self.unit * size
        return {
            "hidden_states": along @ facts.weight.abs() + self.tiny,
            "weight": (off + floor).T @ facts.hidden.abs() + self.tiny,
            "bias": (off + floor).sum(0) + self.tiny,
        }

    def loss(self) -> Tensor:
        """Return the bound of what is returned."""
        case = self.facts.case
        if case.settings["reduction"] == "none":
            return self.rows.reshape(case.labels.shape)
        return (self.facts.upstream.abs() * self.rows).sum() / case.upstream.double()
