"""Make the inputs: hidden states of a real model, or synthetic ones that imitate one.

Every head is measured on rows whose next token is as uncertain as a language model's, since a
filter's work and error depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from str_kernels.options import SafetyConstraint
from str_kernels.vocabulary import VocabularyIndex

CALIBRATION_ROWS = 512  # states that the vocabulary index is made from; none of them is measured
CONSTRAINT_TOKENS = 64  # K for "ours-str"
_ENTROPY = 2.4  # nats, the mean that synthetic rows are made to have
_ZIPF = 1.5  # exponent of the unigram distribution that their shared direction predicts
_DISTINCT_ROWS = 4096  # synthetic rows beyond this repeat
_SIBLINGS, _COUSINS = 64, 4096  # tokens in a fine and in a coarse cluster of the vocabulary

Positions = Literal["responses", "all"]


@dataclass(frozen=True, eq=False)
class Case:
    """One problem for every contender: each of its N rows has a label."""

    name: str  # in a table
    hidden_states: Tensor  # [N, D]
    weight: Tensor  # [V, D], same dtype
    labels: Tensor  # [N] int64
    calibration: Tensor  # [M, D], like the hidden states but other rows, for the vocabulary index

    @property
    def dtype(self) -> str:
        """The dtype of hidden states and weight."""
        return str(self.hidden_states.dtype).removeprefix("torch.")

    @property
    def facts(self) -> dict[str, str | int]:
        """Name, dtype and shape, as every row of results has them."""
        v, d = self.weight.shape
        return {"case": self.name, "dtype": self.dtype, "N": len(self.labels), "V": v, "D": d}

    @cached_property
    def index(self) -> VocabularyIndex:
        """A vocabulary index, built from the calibration rows."""
        return VocabularyIndex.build(self.weight, self.calibration)

    @cached_property
    def usual_constraint(self) -> tuple[SafetyConstraint, Tensor]:
        """The constraint of "ours-str", made once, as a cache would be."""
        return self.constraint(min(CONSTRAINT_TOKENS, len(self.weight)))

    def cast(self, dtype: torch.dtype) -> Case:
        """Return the same numbers, rounded to another dtype."""
        names = ("hidden_states", "weight", "calibration")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def to(self, device: torch.device | str) -> Case:
        """Return the same numbers on another device."""
        names = ("hidden_states", "weight", "labels", "calibration")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def first(self, rows: int) -> Case:
        """Return the first rows alone, with the same index, which is built now."""
        if rows >= len(self.labels):
            return self
        part = replace(self, hidden_states=self.hidden_states[:rows], labels=self.labels[:rows])
        vars(part)["index"] = self.index  # where a cached property lies
        return part

    def constraint(self, k: int, kind: str = "mse") -> tuple[SafetyConstraint, Tensor]:
        """Constrain K tokens, spread over the vocabulary, to a reference ``[N, K]`` near by.

        The reference is like what an aligned model's cache would hold: this model's logits, half a
        nat off; for ``logprob`` less ``log V``, so that they are of a log-probability's size, and
        for ``kl_mass`` with a column of the rest.
        """
        vocab = len(self.weight)
        ids = [i * vocab // k for i in range(k)]
        make = torch.Generator().manual_seed(k)
        logits = self.hidden_states.float() @ self.weight[ids].float().T
        noise = torch.randn(logits.shape, generator=make).to(logits.device)
        reference = logits + 0.5 * noise
        if kind in ("logprob", "kl_mass"):
            reference = reference - math.log(vocab)
        if kind == "kl_mass":
            reference = torch.nn.functional.pad(reference, (0, 1))
        return SafetyConstraint(ids, strength=0.1, kind=kind), reference


def synthetic(
    rows: int, vocab: int, dim: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Case:
    """Imitate a trained model's head and hidden states; fp32.

    They are made on ``device``, since a CPU takes minutes for a large head; the numbers are those
    of its own generator.

    - Head rows: of one norm, with a spectrum that falls off as an embedding's does, so that rows
      crowd into few directions; a token lies near its fine cluster (64 tokens: other forms of a
      word), and that near its coarse one (4,096). Clusters are strewn over the ids.
    - One further direction carries the token's frequency, Zipf's law over the ids, as tokenizers
      number them: a row without other evidence predicts the unigram distribution.
    - Hidden states: that direction, plus a mixture of six likely tokens' rows in random shares. How
      strong the evidence is varies from row to row; its overall strength is solved for a mean
      entropy of 2.4 nats. So some rows are sure and some know next to nothing.
    - Labels are drawn from the model's own softmax: it is calibrated, as trained models are.

    The constants were chosen for the quantiles of entropy and label probability, the spread of the
    logits and the dead mass of Gemma 3 270M on prose and on answers; `Truth.statistics` and
    `live_share` tell them of any case.
    """
    make = torch.Generator(device).manual_seed(seed)
    own, frequency, axis = _head(vocab, dim, make)
    evidence = _evidence(own, frequency, min(rows, _DISTINCT_ROWS) + CALIBRATION_ROWS, make)
    weight = own + frequency[:, None] * axis
    axis = axis / axis.square().sum()  # whose product with the weight is the log-frequency
    axis *= _ZIPF
    states = _solve_strength(evidence[:128], axis, weight) * evidence + axis
    labels = _drawn(states, weight, make)
    calibration, states = states[:CALIBRATION_ROWS], states[CALIBRATION_ROWS:]
    turn = torch.arange(rows, device=device) % len(states)
    return Case("synthetic", states[turn], weight, labels[CALIBRATION_ROWS:][turn], calibration)


def _head(vocab: int, dim: int, make: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make rows ``[V, D]`` without frequency, log-frequencies ``[V]``, their direction ``[D]``."""
    device = make.device
    spectrum = (1.0 + torch.arange(dim, device=device) / 16) ** -1.5
    spectrum /= spectrum.norm()

    def directions(count: int) -> Tensor:
        return torch.randn(count, dim, generator=make, device=device) * spectrum

    coarse, fine = directions(vocab // _COUSINS + 1), directions(vocab // _SIBLINGS + 1)
    family = torch.randint(len(fine), (vocab,), generator=make, device=device)
    branch = torch.randint(len(coarse), (len(fine),), generator=make, device=device)
    own = 0.3 * directions(vocab)
    own += (0.5 * coarse[branch] + 0.5 * fine)[family]
    own = torch.nn.functional.normalize(own, dim=-1)
    frequency = -torch.log(torch.arange(vocab, device=device) + 10.0)
    axis = torch.zeros(dim, device=device)
    axis[-1] = 0.1  # a small part of a row, as the spectrum's last direction would be
    return own, frequency - frequency.mean(), axis


def _evidence(own: Tensor, frequency: Tensor, count: int, make: torch.Generator) -> Tensor:
    """Mix six tokens' rows in a strength that varies by row: ``[count, D]``."""
    tokens = torch.multinomial(frequency.exp(), 6 * count, replacement=True, generator=make)
    shares = torch.empty(count, 6, device=make.device).exponential_(generator=make).sqrt()
    shares /= shares.norm(dim=-1, keepdim=True)
    mixture = (own[tokens].view(count, 6, -1) * shares[..., None]).sum(1)
    return mixture * torch.exp(0.2 * torch.randn(count, 1, generator=make, device=make.device))


def _solve_strength(evidence: Tensor, axis: Tensor, weight: Tensor) -> float:
    """Find by bisection the strength that gives the mean entropy."""
    low, high = 0.0, 500.0
    products, base = evidence @ weight.T, weight @ axis
    for _ in range(20):
        middle = (low + high) / 2
        logp = torch.log_softmax(middle * products + base, -1)
        entropy = -(logp.exp() * logp).sum(-1).mean()
        low, high = (middle, high) if entropy > _ENTROPY else (low, middle)
    return middle


def _drawn(states: Tensor, weight: Tensor, make: torch.Generator) -> Tensor:
    """Draw one token from each row's softmax: ``[N]``."""
    labels = []
    for block in states.split(128):
        total = torch.softmax(block @ weight.T, -1).cumsum(-1)
        at = torch.rand(len(block), 1, generator=make, device=make.device) * total[:, -1:]
        labels.append(torch.searchsorted(total, at)[:, 0].clamp(max=len(weight) - 1))
    return torch.cat(labels)


def from_model(
    model: str, data: str | Path | None, rows: int, *, positions: Positions = "responses"
) -> Case:
    """Read a causal language model's hidden states before its head, where a token follows; fp32.

    Args:
        model: a Hub id, a local folder, or a GGUF file; scale and softcap of its logits are left
            out, for not every contender has them.
        data: conversations as ``.jsonl``; anything else is read as prose, all of it; None: the
            manual that comes with Python.
        rows: how many positions to measure on; fewer if the data has no more.
        positions: which to take of conversations, ``"responses"`` or ``"all"`` (prompts too).

    Raises:
        ValueError: no such file or model, or data of fewer than two rows.
    """
    from str_kernels.bench.reading import read_states

    states, labels, weight = read_states(model, data, rows + CALIBRATION_ROWS, positions)
    first = min(CALIBRATION_ROWS, len(states) // 2)
    text = "Python's manual" if data is None else Path(data).stem
    if data is not None and Path(data).suffix == ".jsonl":
        text += f", {positions}"
    # the first ones, as training makes its index from the first batch
    calibration, states, labels = states[:first], states[first:], labels[first:]
    name = f"{Path(model).name}, {text}"
    return Case(name, states[:rows], weight, labels[:rows], calibration)
