"""Runs token-wise modules over a few tokens at a time, so that their inside never stands whole.

Stage: ``module(x [B, T, D])`` → the same, from slices of the T tokens. With gradients each slice is
checkpointed: its backward computes it again, one slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from str_kernels.huggingface.deferred.forward import inner_forward, install_forward, remove_forward

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
    forward, names = inner_forward(module), list(kwargs)
    values = (*args, *kwargs.values())
    if not all(map(is_states, values)) or values[0].shape[1] <= size:
        return forward(*args, **kwargs)

    def run(*tile: Tensor) -> Tensor:
        given = tile[: len(args)]
        return forward(*given, **dict(zip(names, tile[len(args) :], strict=True)))

    # split, not slices: its backward joins the tiles' gradients once
    tiles = zip(*(map(Tensor.contiguous, x.split(size, 1)) for x in values), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([run(*tile) for tile in tiles], 1)
    settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random is inside
    return torch.cat([checkpoint(run, *tile, **settings) for tile in tiles], 1)


def is_states(value: Any) -> bool:
    """Whether a value is ``[B, T, ·]`` of floating point."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
