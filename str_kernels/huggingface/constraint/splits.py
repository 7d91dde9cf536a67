"""Sequences that are split over processes: who has the parts, and the batch put together again.

Stage: what frameworks say of themselves, the arguments of a forward → `Split` → `Whole`: labels,
mask and ids ``[B, W t]`` of whole sequences, from the parts ``[B, t]`` of W processes.

A position's weight needs the number of labels and positions of its whole sequence, and a cached
reference its ids. Only these integers are gathered, 40 bytes a token at most. Labels are shifted
before the split, as ``shift_labels``: that is how a split batch is known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from str_kernels import waits
from str_kernels.huggingface.constraint.packing import described
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.settings import Positions

_GATHERED = ("position_ids", "seq_idx")  # of the arguments that tell packed sequences apart


@dataclass(frozen=True)
class Split:
    """The processes that have the parts of the same sequences.

    Attributes:
        owner: who splits, for errors.
        group: of these processes; None: it is not known yet.
        by_ids: whether the position ids tell where the parts belong; else parts follow each other
            as the processes do.
    """

    owner: str
    group: Any = None
    by_ids: bool = False

    @property
    def size(self) -> int:
        """How many processes there are."""
        return distributed.get_world_size(self.group)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all; every process has to call."""
        total = tensor.detach().clone()
        distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, sum_here: Tensor, labels_here: Tensor) -> Tensor:
        """The sum of all over the labels of all, the same in every process, differentiable."""
        return _Mean.apply(sum_here, labels_here, self.group)


class _Mean(torch.autograd.Function):
    """``Σ sum / Σ labels`` over processes; each one's gradient is what all ask of its sum."""

    @staticmethod
    def forward(ctx: Any, here: Tensor, labels: Tensor, group: Any) -> Tensor:
        sums = torch.stack([here.double(), labels.double()])
        distributed.all_reduce(sums, group=group)
        total, count = sums.unbind()
        ctx.group, ctx.dtype = group, here.dtype
        ctx.save_for_backward(count)
        return torch.where(count > 0, total / count.clamp(min=1), 0.0).to(here.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (count,) = ctx.saved_tensors
        gradient = gradient.double()
        distributed.all_reduce(gradient, group=ctx.group)
        found = torch.where(count > 0, gradient / count.clamp(min=1), 0.0)
        return found.to(ctx.dtype), None, None


class Whole(NamedTuple):
    """A batch whose parts were gathered, in the order of its sequences.

    Attributes:
        labels: ``[B, W t]``, shifted.
        sequences: ids (if they were asked for), mask and packing of the whole sequences.
        places: ``[B, t]``, where the tokens of this process stand.
    """

    labels: Tensor
    sequences: Sequences
    places: Tensor

    def mine(self, table: Tensor) -> Tensor:
        """The part ``[B, t]`` of ``table [B, W t]`` that is this process's."""
        return table.to(self.places.device).gather(1, self.places)


def split_of(arguments: Mapping[str, Any]) -> Split | None:
    """The split of this batch, as accelerate or DeepSpeed tell of it; None: they tell of none."""
    split = _owner()
    known = split is not None and split.group is not None
    return split if known and arguments.get("shift_labels") is not None else None


def require_whole(arguments: Mapping[str, Any], *, training: bool, positions: Positions) -> None:
    """Refuse a part of a sequence of which nobody tells who has the others.

    On a GPU what its position ids show is an error of a later call.

    Raises:
        ValueError: the sequence is split over processes.
    """
    owner, shifted = _owner(), arguments.get("shift_labels") is not None
    if owner is not None and (training or shifted):
        missing = "the labels were not shifted before" if owner.group else "by no group yet"
        _refuse(positions, f"{owner.owner}; {missing}")
    ids = arguments.get("position_ids")
    if not (shifted or owner) or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    without = (ids != 0).all()
    if not waits.allowed(ids.device):
        waits.judge_later(without, lambda: _refuse(positions, "no position id is 0"))
    elif without:
        _refuse(positions, "no position id is 0")


def _refuse(positions: Positions, why: str) -> None:
    raise ValueError(
        f"positions={positions!r}: the sequence is split over processes ({why}), and a weight "
        "needs the whole of it: let accelerate or DeepSpeed split it, with shift_labels, or use "
        "positions='labels', or position_weights in the batch."
    )


def gathered(split: Split, labels: Tensor, sequences: Sequences, *, ids: bool) -> Whole:
    """Put a batch together from its parts; every process of the group has to call.

    Args:
        split: of the batch.
        labels: ``[B, t]`` of this process, shifted.
        sequences: of this process.
        ids: whether the token ids are needed.

    Raises:
        ValueError: an argument that does not fit, or tells too little of the whole.
    """
    parts = {"labels": labels} | _parts(split, labels.shape, sequences, ids=ids)
    mine = torch.stack([part.to(labels.device).long() for part in parts.values()])
    theirs = [torch.empty_like(mine) for _ in range(split.size)]
    distributed.all_gather(theirs, mine.contiguous(), group=split.group)
    whole = torch.cat(theirs, -1)
    places = torch.arange(whole.shape[-1], device=whole.device).expand(whole.shape[1:])
    found = dict(zip(parts, whole, strict=True))
    if split.by_ids:
        order = found["position_ids"].argsort(stable=True, dim=-1)
        found = {name: table.gather(1, order) for name, table in found.items()}
        places = order.argsort(-1)
        _refuse_packing(split, found)
    here, width = distributed.get_rank(split.group), labels.shape[-1]
    packing = {name: found[name] for name in _GATHERED if name in found}
    together = replace(sequences, ids=found.get("ids"), mask=found.get("mask"), packing=packing)
    return Whole(found["labels"], together, places[:, here * width : (here + 1) * width])


def _parts(
    split: Split, shape: torch.Size, sequences: Sequences, *, ids: bool
) -> dict[str, Tensor]:
    """What is gathered beside the labels, by name, each ``[B, t]``."""
    if sequences.encoder is not None:
        raise ValueError(
            f"model: has an encoder, and its sequences cannot be split ({split.owner}): use "
            "positions='labels' and reference='adapter_off'."
        )
    if sequences.packing.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"cu_seq_lens_q: does not tell whether it is of the part or of the whole where "
            f"sequences are split ({split.owner}); give position_ids instead."
        )
    given = {name: sequences.packing.get(name) for name in _GATHERED}
    given["mask"] = sequences.mask
    if ids:
        given["ids"] = sequences.ids
    if split.by_ids and given["position_ids"] is None:
        raise ValueError(
            f"position_ids: tell where each part belongs, where sequences are split "
            f"({split.owner}); give those of the whole sequences."
        )
    given = {name: part for name, part in given.items() if part is not None}
    for name, part in given.items():
        _require_part(name, part, shape, split)
    if "mask" in given:
        given["mask"] = given["mask"] != 0
    return {name: part.expand(shape) for name, part in given.items()}


def _require_part(name: str, part: Any, shape: torch.Size, split: Split) -> None:
    rows = isinstance(part, Tensor) and part.dim() == 2 and part.shape[0] in (1, shape[0])
    counted = rows and (name == "mask" or not part.is_floating_point())
    if not counted or part.shape[1] != shape[1]:
        raise ValueError(
            f"{_ARGUMENTS.get(name, name)}={described(part)}: must be integers {list(shape)}, one "
            f"for each token of this part, where sequences are split ({split.owner})."
        )


_ARGUMENTS = {"mask": "attention_mask", "ids": "input_ids"}


def _refuse_packing(split: Split, found: dict[str, Tensor]) -> None:
    """Refuse ids of which two are alike: packed sequences begin anew, and parts lose their order.

    On a GPU it is an error of a later call.
    """
    ids = found["position_ids"]
    again = ids[:, 1:] == ids[:, :-1]
    if "mask" in found:  # padding may repeat an id
        again = again & found["mask"][:, 1:].bool() & found["mask"][:, :-1].bool()

    def refuse() -> None:
        raise ValueError(
            f"position_ids: some are given twice in a row, as packed sequences have them, and "
            f"{split.owner} splits rows in another order: do not pack, or use positions='labels'."
        )

    if not waits.allowed(ids.device):
        waits.judge_later(again.any(), refuse)
    elif again.any():
        refuse()


@contextmanager
def attends_whole(model: nn.Module, split: Split | None) -> Iterator[None]:
    """In this block the model attends to whole sequences in evaluation mode too.

    DeepSpeed's Ulysses leaves the exchange out of a module that is in evaluation mode, and a
    reference pass is; the dropout that a module asked for was chosen before.
    """
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if split is None or split.by_ids or name is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS:
        yield
        return
    exchanging = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, module.training = module.training, True
        try:
            return exchanging(module, *args, **kwargs)
        finally:
            module.training = before

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = exchanging


def _owner() -> Split | None:
    """Who splits sequences in this process, whatever this batch is."""
    return _of_accelerate() or _of_deepspeed()


def _of_accelerate() -> Split | None:
    state = sys.modules.get("accelerate.state")
    shared = {} if state is None else state.AcceleratorState._shared_state
    config = shared.get("parallelism_config")
    if getattr(config, "cp_enabled", False):
        owner = f"accelerate's context parallelism, cp_size={config.cp_size}"
        mesh = shared.get("device_mesh")
        return Split(owner, None if mesh is None else mesh["cp"].get_group(), by_ids=True)
    if getattr(config, "sp_enabled", False):
        owner = f"accelerate's sequence parallelism, sp_size={config.sp_size}"
        return Split(owner, _ulysses_group())
    return None


def _of_deepspeed() -> Split | None:
    group = _ulysses_group()
    return None if group is None else Split("DeepSpeed's Ulysses", group)


def _ulysses_group() -> Any:
    groups = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    return None if groups is None else groups._SEQUENCE_PARALLEL_GROUP
