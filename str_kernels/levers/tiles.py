"""Runs token-wise modules over a few tokens at a time, so that their inside never stands whole.

Stage: ``module(x [B, T, D])`` → the same, from slices of the T tokens. Each slice is
checkpointed: its backward computes it again, one slice at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from str_kernels.huggingface.deferred.forward import inner_forward, install_forward, remove_forward

_CAPACITY = "expert_capacity"  # transformers' setting of experts that take only so many tokens
_FLAG = "output_router_logits"  # transformers' argument that adds the balance loss of experts


@contextmanager
def tiled(
    model: nn.Module, modules: list[nn.Module], size: int, run: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Run ``modules`` of this model over ``size`` tokens at a time in this block, by `in_tiles`.

    A function ``run`` of the same arguments takes its place.

    Raises:
        ValueError: the model adds a balance loss of its experts, which its forwards raise too, or
            its experts drop tokens beyond a capacity.
    """
    refuse_balance_loss(model)
    _refuse_capacity(model)
    hook = model.register_forward_pre_hook(
        lambda called, args, kwargs: refuse_balance_loss(called, kwargs), with_kwargs=True
    )
    for module in modules:
        install_forward(module, partial(run or in_tiles, size))
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


def _refuse_capacity(model: nn.Module) -> None:
    capacity = getattr(model.config.get_text_config(), _CAPACITY, None)
    if capacity is not None:
        raise ValueError(
            f"tile_tokens: {type(model).__name__} drops tokens beyond {_CAPACITY}={capacity} of "
            "each expert, counted over all tokens at once; leave the tiles out."
        )


def in_tiles(size: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module(...)``, over ``size`` tokens at a time where the arguments are ``[B, T, ·]``."""
    values = (*args, *kwargs.values())
    if not all(map(is_states, values)) or values[0].shape[1] <= size:
        return inner_forward(module)(*args, **kwargs)
    call = checkpointed_call(module, args, kwargs)
    return torch.cat([call(*tile) for tile in tiles_of(values, size)], 1)


def checkpointed_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """``module`` over a tile of each of these arguments, computed again in its backward."""
    # a closure over the arguments would keep them until the backward of the layer
    run = partial(_called, inner_forward(module), len(args), tuple(kwargs))
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def _called(forward: Callable, count: int, names: Sequence[str], *values: Tensor) -> Tensor:
    """``forward`` of the first ``count`` values by place and of the others by name."""
    return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))


def tiles_of(values: Sequence[Tensor], sizes: int | list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the tokens of each value, of one size or of these."""
    # split, not slices: its backward joins the gradients of all tiles once
    return zip(*(map(Tensor.contiguous, x.split(sizes, 1)) for x in values), strict=True)


def is_states(value: Any) -> bool:
    """Whether a value is ``[B, T, ·]`` of floating point."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
