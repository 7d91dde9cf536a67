"""Modules in tiles on meta tensors: those at both ends run, and the others only leave what they do.

Stage: ``module(x [B, T, D])`` → the same from few tiles. Each tile leaves equal bytes, so the most
is at one of the first two (the second adds gradients to those of the first) or of the last two,
where the last is the shorter: a step takes as much as with all of them, and is counted sooner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.levers.tiles import checkpointed_call, in_tiles, is_states, tiles_of

_ENDS = 2  # tiles at each end that run


def in_few_tiles(size: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``in_tiles`` of a module, without the inside of the tiles in the middle."""
    values = (*args, *kwargs.values())
    if not all(map(is_states, values)) or values[0].shape[1] <= (2 * _ENDS + 1) * size:
        return in_tiles(size, module, *args, **kwargs)
    last = (values[0].shape[1] - 1) % size + 1
    ends = [size] * _ENDS, [size] * (_ENDS - 1) + [last]
    middle = values[0].shape[1] - sum(map(sum, ends))
    call, made = checkpointed_call(module, args, kwargs), []
    for tile in tiles_of(values, [*ends[0], middle, *ends[1]]):
        if len(made) == _ENDS:
            trained = torch.empty(0, device="meta", requires_grad=made[0].requires_grad)
            made.append(_Middle.apply(made[0].detach(), trained, *tile))
        else:
            made.append(call(*tile))
    return torch.cat(made, 1)


class _Middle(torch.autograd.Function):
    """Tiles that keep their inputs, and make their outputs and the gradients of their inputs."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, _: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(*values)
        rows, length = values[0].shape[:2]
        return like.new_empty(rows, length, like.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        needed = ctx.needs_input_grad[2:]
        made = (torch.empty_like(x) for x in ctx.saved_tensors)
        return None, None, *(x if need else None for x, need in zip(made, needed, strict=True))
