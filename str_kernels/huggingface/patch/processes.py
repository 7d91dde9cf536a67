"""Processes that train one model together decide alike.

Stage: something in each process → the same in all of them.

A collective waits for every process, so only a group is asked that certainly makes the same
forwards: that of the DDP, FSDP or ZeRO around the model. Without one, each process is alone.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from str_kernels.huggingface.deferred.sharding import is_fsdp1, is_fsdp2


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
    """The processes in the DDP, FSDP or ZeRO around this model; call it in its forward."""
    if not _initialised():
        return ALONE
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None:
        return Together((wrapper.process_group,))
    for module in model.modules():
        if is_fsdp1(module):
            return Together((module.process_group,))
    meshes = (getattr(p, "device_mesh", None) for p in model.parameters())
    mesh = next((mesh for mesh in meshes if mesh is not None), None) or _mesh_around(model)
    if mesh is not None:
        return Together(tuple(mesh.get_all_groups()))
    group = _group_of_zero(model)
    return ALONE if group is None else Together((group,))


def _mesh_around(model: nn.Module) -> Any:
    """The mesh of an FSDP2 root that has gathered every parameter: a module around this model.

    Torch tells of it in private names alone; where it does not, each process decides alone.
    """
    states = sys.modules.get("torch.distributed._composable_state")
    for module in list(getattr(states, "_module_state_mapping", ())):
        if not is_fsdp2(module) or all(part is not model for part in module.modules()):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        group = groups[0] if groups else getattr(state, "_fsdp_param_group", None)
        mesh = getattr(getattr(group, "mesh_info", None), "mesh", None)
        if mesh is not None:
            return mesh
    return None


def _group_of_zero(model: nn.Module) -> Any:
    """The processes among which DeepSpeed's ZeRO splits what belongs to these parameters."""
    groups = sys.modules.get("deepspeed.utils.groups")
    marks = ("_hp_mapping", "ds_id")  # of ZeRO-1 and -2, and of ZeRO-3
    if groups is None or not any(hasattr(p, mark) for p in model.parameters() for mark in marks):
        return None
    return groups._get_sequence_data_parallel_group()


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
