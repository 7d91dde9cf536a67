"""Draw one case of `linear_cross_entropy` from a seed: every option, then tensors that fit it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.backends.torch import TorchBackend
from str_kernels.engine.contract import Backend

# A value is drawn as often as it stands here.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "backend": ("torch",) * 14 + ("dense",) * 5 + ("triton",),
    "dtype": ("float32", "float32", "bfloat16", "float16", "float64"),
    "rows": (0, 1, 2, 7, 7, 24, 24, 33, 33),
    "vocab": (1, 2, 5, 127, 128, 129, 300, 300, 517, 517, 700, 700),
    "dim": (1, 2, 7, 16, 33, 130),
    "shape": ("flat",) * 5 + ("batch",) * 4 + ("scalar",),
    "layout": ("contiguous", "contiguous", "strided"),
    "labels": ("some",) * 6 + ("all",) * 3 + ("none",),
    "label_dtype": ("int64", "int32"),
    "ignore_index": (-100, -1, 3),
    "bias": (False, True),
    "masked": (None, None, "low", "-inf"),
    "spread": (0.0, 1.0, 1.0, 4.0, 4.0, 20.0, 150.0),
    "offset": (0.0,) * 6 + (64.0, -1000.0, 16384.0),
    "logit_scale": (1.0,) * 4 + (0.3, -0.7, 0.0, 16.0),
    "softcap": (None,) * 5 + (0.5, 5.0, 30.0, 1000.0),
    "label_smoothing": (0.0, 0.0, 0.0, 0.1, 0.1, 0.9, 1.0),
    "z_loss": (0.0, 0.0, 0.0, 1e-4, 1e-2, 1.0),
    "reduction": ("mean", "sum", "none"),
    "num_items": (None,) * 6 + (7, 2.5, "tensor", 0),
    "safety": (None, "mse", "logprob", "kl"),
    "tokens": (1, 2, 5, 17, 64),
    "token_weights": (False, True),
    "temperature": (1.0, 0.5, 3.0, 0.02, 100.0),
    "strength": (None, 0.0, 0.1, 1e4),
    "reference": ("rows", "shared", "float32"),
    "position_weights": (None, "some", "zero"),
    "filter_eps": ("auto", "auto", 0.0, 0.0, 1e-30, 1e-3, 0.1, 0.9),
    "index": (None, None, "plain", "int8", "fp8"),
    "screen": ("auto", "auto", "exact", "bf16", "int8", "fp8"),
    "byte_budget": (None, None, 1, 1 << 13, 1 << 16),
    "needs": ("all", "all", "head", "hidden_states", "weight", "bias", "none"),
    "autocast": (None,) * 6 + ("bfloat16", "float16"),
}


@dataclass(frozen=True)
class Case:
    """What was drawn: ``options`` as JSON can hold them, the leaves, and the other arguments."""

    seed: int
    options: dict[str, Any]
    leaves: dict[str, Tensor]
    labels: Tensor
    constants: dict[str, Any]
    settings: dict[str, Any]
    upstream: Tensor

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of leaves whose gradients are compared."""
        needs = self.options["needs"]
        named = {"all": self.leaves, "head": ("weight", "bias")}.get(needs, (needs,))
        return tuple(name for name in self.leaves if name in named)

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states, cast as autocast demands."""
        return getattr(torch, self.options["autocast"] or self.options["dtype"])


def draw_options(seed: int) -> dict[str, Any]:
    """Draw every option, and change those that the others do not allow."""
    source = random.Random(seed)
    drawn = {name: source.choice(values) for name, values in OPTIONS.items()}
    if drawn["backend"] == "triton":  # whose interpreter is slow
        drawn["rows"], drawn["vocab"] = min(drawn["rows"], 24), min(drawn["vocab"], 300)
        if drawn["dtype"] == "float64":
            drawn["dtype"] = "float32"
    elif drawn["screen"] == "fp8":  # on a CPU in Triton's interpreter alone
        drawn["screen"] = "int8"
    if drawn["dtype"] == "float64":
        drawn["autocast"] = None
    if drawn["shape"] == "scalar":
        drawn["rows"] = 1
    drawn["tokens"] = min(drawn["tokens"], drawn["vocab"])
    if drawn["safety"] == "kl" and drawn["tokens"] < 2:
        drawn["safety"] = "mse"
    if drawn["safety"] != "kl":
        drawn["temperature"] = 1.0
    if drawn["reduction"] != "mean":
        drawn["num_items"] = None
    if drawn["backend"] == "dense" or drawn["filter_eps"] == 0.0:
        drawn["screen"] = "auto"
    if drawn["needs"] == "bias" or drawn["masked"]:
        drawn["bias"] = True
    # smoothing would learn the mask, and 0 · inf is no number
    if drawn["vocab"] < 100 or drawn["label_smoothing"] or not drawn["logit_scale"]:
        drawn["masked"] = None
    if drawn["dim"] == 1:
        drawn["offset"] = 0.0
    return drawn


def draw(seed: int) -> Case:
    """Draw the options and tensors of one case."""
    options, g = draw_options(seed), torch.Generator().manual_seed(seed)
    return _Drawing(seed, options, g).case()


class _Drawing:
    """The tensors of one case, in the order in which they are drawn."""

    def __init__(self, seed: int, options: dict[str, Any], g: torch.Generator) -> None:
        self.seed, self.options, self.g = seed, options, g
        self.dtype = getattr(torch, options["dtype"])
        self.lead = {"flat": (options["rows"],), "scalar": ()}.get(options["shape"])
        if self.lead is None:
            self.lead = (3, options["rows"] // 3) if options["rows"] else (2, 0)
        self.rows = torch.Size(self.lead).numel()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g, dtype=torch.float64)

    def case(self) -> Case:
        o = self.options
        hidden = self.normal(self.rows, o["dim"])
        weight = self.normal(o["vocab"], o["dim"]) * (o["spread"] / o["dim"] ** 0.5)
        if o["offset"]:
            hidden[:, 0], weight[:, 0] = o["offset"], 1.0
        safe = torch.randperm(o["vocab"], generator=self.g)[: o["tokens"]]
        labels = self.labels(hidden @ weight.T)
        leaves = {"hidden_states": hidden.view(*self.lead, o["dim"]), "weight": weight}
        if o["bias"]:
            leaves["bias"] = self.bias(labels, safe)
        leaves = {name: self.laid_out(x.to(self.dtype)) for name, x in leaves.items()}
        labels = labels.to(getattr(torch, o["label_dtype"])).view(self.lead)
        return Case(
            self.seed,
            o,
            leaves,
            self.laid_out(labels),
            self.constants(safe, leaves),
            self.settings(safe),
            0.5 + self.uniform(*(self.lead if o["reduction"] == "none" else ())),
        )

    def labels(self, logits: Tensor) -> Tensor:
        """Draw likely labels and unlikely ones, and ignore some."""
        noise = self.options["spread"] * self.normal(*logits.shape)
        labels = (logits + noise).argmax(-1)
        ignored = {"some": 0.3, "all": 0.0, "none": 1.0}[self.options["labels"]]
        ignore = self.uniform(self.rows) < ignored
        return torch.where(ignore, self.options["ignore_index"], labels)

    def bias(self, labels: Tensor, safe: Tensor) -> Tensor:
        """Draw a bias; it may mask tokens that are neither labels nor safety tokens."""
        vocab, masked = self.options["vocab"], self.options["masked"]
        bias = self.normal(vocab)
        if masked:
            low = -6e4 if self.dtype == torch.float16 else -1e9
            mask = self.uniform(vocab) < 0.3
            mask[torch.cat([safe, labels[labels >= 0]])] = False
            sign = -1.0 if self.options["logit_scale"] < 0 else 1.0
            bias[mask] = sign * (low if masked == "low" else -torch.inf)
        return bias

    def laid_out(self, x: Tensor) -> Tensor:
        """Return the same numbers, perhaps as every other one of a larger tensor's."""
        if self.options["layout"] == "contiguous" or not x.dim():
            return x
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 77)
        wide[..., ::2] = x
        return wide[..., ::2]

    def constants(self, safe: Tensor, leaves: dict[str, Tensor]) -> dict[str, Any]:
        o, constants = self.options, {}
        if o["safety"]:
            shape = (len(safe),) if o["reference"] == "shared" else (*self.lead, len(safe))
            values = (1.0 + o["spread"]) * self.normal(*shape) - 3.0 * (o["safety"] == "logprob")
            if o["offset"] and o["safety"] == "mse":
                values += o["offset"]
            same = o["reference"] != "float32"
            constants["reference"] = values.to(self.dtype if same else torch.float32)
            if o["position_weights"]:
                weights = self.uniform(*self.lead)
                weights *= (self.uniform(*self.lead) < 0.7) * (o["position_weights"] == "some")
                constants["position_weights"] = self.laid_out(weights.float())
        if o["index"]:
            screen = None if o["index"] == "plain" else o["index"]
            hidden = leaves["hidden_states"] if self.rows else None
            constants["index"] = VocabularyIndex.build(leaves["weight"], hidden, screen=screen)
        constants["num_items_in_batch"] = o["num_items"]
        if o["num_items"] == "tensor":
            constants["num_items_in_batch"] = torch.tensor([9])
        return constants

    def settings(self, safe: Tensor) -> dict[str, Any]:
        o = self.options
        names = ("ignore_index", "reduction", "logit_scale", "softcap", "label_smoothing", "z_loss")
        settings = {name: o[name] for name in (*names, "filter_eps", "screen")}
        settings["backend"] = backend_of(o)
        if o["safety"]:
            weights = None
            if o["token_weights"]:  # zeros among them, but never fewer than two others
                weights = [1.0, 0.5, *(i % 3 for i in range(2, len(safe)))][: len(safe)]
            settings["safety"] = SafetyConstraint(
                safe.tolist(),
                o["strength"],
                kind=o["safety"],
                token_weights=weights,
                temperature=o["temperature"],
            )
        return settings


def backend_of(options: dict[str, Any]) -> str | Backend:
    """Make the backend, with its byte budget."""
    name, budget = options["backend"], options["byte_budget"]
    if budget is None or name == "dense":
        return name
    if name == "torch":
        return TorchBackend(budget)
    from str_kernels.backends.triton import TritonBackend

    return TritonBackend(budget)
