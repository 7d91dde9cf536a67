"""A sequence split over two processes, with attention to the whole of it, as frameworks do it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_gather
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.distributed.models import LENGTH
from tests.distributed.pool import WORLD

# context parallelism by accelerate, in order or head and tail together, and DeepSpeed's Ulysses
SCHEMES = ("cp", "zigzag", "ulysses")
_DEEPSPEED = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
_ATTENTION = "split_for_tests"


def place(scheme: str, rank: int, length: int = LENGTH) -> Tensor:
    """Which tokens of a sequence a process has, ``[length / WORLD]``."""
    if scheme != "zigzag":
        return torch.arange(length).chunk(WORLD)[rank]
    chunks = torch.arange(length).chunk(2 * WORLD)
    return torch.cat([chunks[rank], chunks[2 * WORLD - 1 - rank]])


def part(batch: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """This process's part of every sequence, with the labels shifted before."""
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    ids = torch.arange(labels.shape[1]).expand_as(labels)
    whole = {"position_ids": ids, **batch, "shift_labels": labels}
    if scheme == "ulysses":  # its loader leaves the labels out, and the trainer puts these there
        whole["labels"] = labels
    mine = place(scheme, torch.distributed.get_rank(), labels.shape[1])
    return {name: x[:, mine].contiguous() for name, x in whole.items()}


@contextmanager
def told(scheme: str, *, grouped: bool = True) -> Iterator[None]:
    """In this block the framework says of itself what it says when it splits sequences."""
    shared = AcceleratorState._shared_state
    before = dict(shared)
    if scheme == "ulysses":
        group = torch.distributed.group.WORLD
        sys.modules[_DEEPSPEED] = types.SimpleNamespace(_SEQUENCE_PARALLEL_GROUP=group)
    else:
        shared["parallelism_config"] = ParallelismConfig(cp_size=WORLD)
        if grouped:
            shared["device_mesh"] = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("cp",))
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)
        sys.modules.pop(_DEEPSPEED, None)


@contextmanager
def attending(model: nn.Module, scheme: str, starts: Tensor | None = None) -> Iterator[None]:
    """Let a model attend to whole sequences; ``starts [B, T]`` is where packed ones begin.

    As DeepSpeed's Ulysses with accelerate, that of ``"ulysses"`` attends to its part alone in
    evaluation mode.
    """
    rank = torch.distributed.get_rank()
    mine = place(scheme, rank)
    every = torch.cat([place(scheme, r) for r in range(WORLD)])
    numbers = torch.zeros(1, LENGTH) if starts is None else starts.long().cumsum(-1)

    def attend(module, q, k, v, mask, scaling=None, **_: Any) -> tuple[Tensor, None]:
        there = every
        if module.training or scheme != "ulysses":
            k, v = (torch.cat(all_gather(x.contiguous()), 2) for x in (k, v))
        else:
            there = mine
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        seen = there[None, :] <= mine[:, None]
        seen = seen & (numbers[:, None, there] == numbers[:, mine, None])
        out = nn.functional.scaled_dot_product_attention(q, k, v, seen[:, None], scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = attend  # as DeepSpeed does
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, lambda *args, **kwargs: None)
    base = model.get_base_model()
    before = base.config._attn_implementation
    base.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def items(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The number by which all processes divide."""
    return {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}
