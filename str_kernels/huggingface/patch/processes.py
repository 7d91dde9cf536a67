"""Processes that train one model together decide alike.

Stage: something in each process → the same in all of them.

A collective waits for every process, so only a group is asked that certainly makes the same
forwards: that of the DDP or FSDP around the model. Without one, each process is alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from str_kernels.huggingface.deferred.sharding import is_fsdp1


class Together(NamedTuple):
    """The processes that make the same forwards, one group for each dimension of their mesh."""

    groups: tuple[Any, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether this process decides for the others."""
        return all(distributed.get_rank(group) == 0 for group in self.groups)

    def shared(self, tensor: Tensor) -> Tensor:
        """The leader's tensor; every process gives one of its shape."""
        for group in self.groups:
            distributed.broadcast(tensor, group=group, group_src=0)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all."""
        for group in self.groups:
            distributed.all_reduce(tensor, group=group)
        return tensor

    def any(self, found: bool, device: torch.device) -> bool:
        """Whether it is so in any process; they wait for each other."""
        if not self.groups:
            return found
        return bool(self.total(torch.tensor(float(found), device=device)).item())


ALONE = Together()


def together(model: nn.Module) -> Together:
    """The processes in the DDP or FSDP around this model; call it in the model's forward."""
    if not _initialised():
        return ALONE
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None:
        return Together((wrapper.process_group,))
    for module in model.modules():
        if is_fsdp1(module):
            return Together((module.process_group,))
    meshes = (getattr(p, "device_mesh", None) for p in model.parameters())
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    return ALONE if mesh is None else Together(tuple(mesh.get_all_groups()))


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
