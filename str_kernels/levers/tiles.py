"""Runs token-wise modules over a few tokens at a time, so that their inside never stands whole.

Stage: ``module(x [B, T, D])`` → the same, from slices of the T tokens. The backward computes each
slice again, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from str_kernels.huggingface.deferred.forward import inner_forward, install_forward, remove_forward
from str_kernels.huggingface.deferred.modes import Modes

_FLAG = "output_router_logits"  # transformers' argument that adds the balance loss of experts


@contextmanager
def tiled(model: nn.Module, modules: list[nn.Module], size: int) -> Iterator[None]:
    """Run ``modules`` of this model over ``size`` tokens at a time in this block.

    Raises:
        ValueError: the model adds a balance loss of its experts; its forwards raise this too.
    """
    refuse_balance_loss(model)
    hook = model.register_forward_pre_hook(
        lambda called, args, kwargs: refuse_balance_loss(called, kwargs), with_kwargs=True
    )
    for module in modules:
        install_forward(module, partial(in_tiles, size))
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            remove_forward(module)


def refuse_balance_loss(model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
    """Refuse a loss that balances routed experts, which is of all tokens at once.

    Raises:
        ValueError: the configuration or the arguments ask for one.
    """
    configured = getattr(model.config.get_text_config(), _FLAG, False)
    if (arguments or {}).get(_FLAG, configured):
        raise ValueError(
            f"tile_tokens: {type(model).__name__} adds the balance loss of its routed experts, "
            f"which is computed from all tokens at once; set {_FLAG}=False or leave the tiles out."
        )


def in_tiles(size: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module(...)``, over ``size`` tokens at a time where the arguments are ``[B, T, ·]``."""
    values = (*args, *kwargs.values())
    if not all(map(is_states, values)) or values[0].shape[1] <= size:
        return inner_forward(module)(*args, **kwargs)
    run = partial(_called, inner_forward(module), len(args), tuple(kwargs))
    trained = [p for p in module.parameters() if p.requires_grad]
    return _Tiles.apply(run, size, len(values), *values, *trained)


class _Tiles(Function):
    """A token-wise function, slice by slice; it keeps its arguments and nothing else.

    Torch's checkpoint of each slice would keep them too, and inside that of a layer it would hold
    them on the device until the layer's backward.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable, size: int, count: int, *tensors: Tensor) -> Tensor:
        """``run`` over slices of the first ``count`` tensors; the others are its parameters."""
        values, ctx.trained = tensors[:count], tensors[count:]
        ctx.run, ctx.size, ctx.modes = run, size, Modes.now(values[0].device.type)
        ctx.save_for_backward(*values)
        return _joined((run(*tile) for tile in _tiles(values, size)), values[0].shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        """Compute each slice again, and its gradients from its part of ``gradient``."""
        values, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        found = [
            torch.empty_like(x) if need else None for x, need in zip(values, needs, strict=False)
        ]
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        start = 0
        for tile in _tiles((*values, gradient), ctx.size):
            part = slice(start, start + ctx.size)
            *given, upstream = (x.detach() for x in tile)
            given = [x.requires_grad_(need) for x, need in zip(given, needs, strict=False)]
            wanted = [x for x in given if x.requires_grad]
            with torch.enable_grad(), ctx.modes.autocast_again():
                output = ctx.run(*given)
            made = torch.autograd.grad(output, (*wanted, *ctx.trained), upstream, allow_unused=True)
            of_values = iter(made)
            for whole in found:
                if whole is not None:
                    whole[:, part] = next(of_values)
            for place, more in enumerate(of_values):
                sums[place] = more if sums[place] is None else sums[place].add_(more)
            start += ctx.size
        return None, None, None, *found, *sums


def _called(forward: Callable, count: int, names: Sequence[str], *values: Tensor) -> Tensor:
    """``forward`` of the first ``count`` values by place and of the others by name."""
    return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))


def _tiles(values: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(map(Tensor.contiguous, x.split(size, 1)) for x in values), strict=True)


def _joined(parts: Iterator[Tensor], length: int) -> Tensor:
    """The parts along dimension 1, each freed as soon as it is copied."""
    whole, start = None, 0
    for part in parts:
        if whole is None:
            whole = part.new_empty(part.shape[0], length, *part.shape[2:])
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return whole


def is_states(value: Any) -> bool:
    """Whether a value is ``[B, T, ·]`` of floating point."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
