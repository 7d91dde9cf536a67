"""Sliding windows of attention in blocks, without a mask ``[T, T]`` and without what it hides.

Stage: transformers' mask of a sliding window → `Window`, which stands for it → attention of blocks
of one window's length, each over its own keys and those of the block before.

A mask takes T² bytes, 16 GiB at 131,072 tokens, and torch's attention computes all of T² below it.
Any other mask (padding, packing, images) is made as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from str_kernels.notices import say_once

NAME = "str_kernels_windows"


class Window(Tensor):
    """Stands for the mask of a sliding window, and has no values; any use as a tensor is refused.

    Attributes:
        size: how many keys a query sees, its own among them.
    """

    size: int

    @staticmethod
    def of(size: int, device: Any) -> Window:
        """Make one for windows of so many keys."""
        window = torch.empty(0, dtype=torch.bool, device=device).as_subclass(Window)
        window.size = size
        return window

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Let attributes be read, and nothing be computed."""
        if getattr(function, "__name__", "") == "__get__":
            return super().__torch_function__(function, types, args, kwargs or {})
        raise ValueError(
            "window_attention: the model computes with the mask of its sliding windows, which is "
            "not made; leave window_attention out."
        )


def has_windows(config: Any) -> bool:
    """Whether some layers of this configuration of text have a sliding window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


@contextmanager
def windowed(model: nn.Module) -> Iterator[None]:
    """Let this model attend in windows in this block.

    Raises:
        ValueError: its attention has no sliding windows, or is not torch's.
    """
    config = model.config.get_text_config()
    if not has_windows(config):
        raise ValueError(
            f"window_attention=True: no layer of {type(model).__name__} has a sliding window; "
            "leave it out."
        )
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"window_attention=True: replaces attn_implementation='sdpa', and the model has "
            f"{config._attn_implementation!r}; load it with 'sdpa', or leave it out."
        )
    AttentionInterface.register(NAME, in_windows)
    AttentionMaskInterface.register(NAME, mask_or_window)
    # a layer may have a copy of the model's configuration; other modalities have their own
    configs = [c for c in _configs(model) if has_windows(c) and c._attn_implementation == "sdpa"]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _configs(model: nn.Module) -> list[Any]:
    found = (getattr(module, "config", None) for module in model.modules())
    text = model.config.get_text_config()
    unique = {id(c): c for c in (text, *found) if hasattr(c, "_attn_implementation")}
    return list(unique.values())


def mask_or_window(*args: Any, **kwargs: Any) -> Tensor | None:
    """Transformers' mask for torch's attention, or the `Window` that it would be."""
    size, padding = kwargs.get("local_size"), kwargs.get("attention_mask")
    length, queries = kwargs["kv_length"], kwargs.get("q_length")
    if queries is None:  # transformers before 5
        queries = len(kwargs["cache_position"])
    long_enough = size is not None and queries == length > 2 * size
    if not long_enough:
        return sdpa_mask(*args, **kwargs)
    if not kwargs.get("allow_is_causal_skip"):
        if padding is None:  # transformers looks for packed sequences, and tells not what it found
            say_once(
                "str_kernels: window_attention has no part in batches without an attention_mask, "
                "which may be packed; collate one of ones to use it"
            )
        return sdpa_mask(*args, **kwargs)
    padded = padding is not None and not padding.bool().all()
    if padded or not _slides(kwargs["mask_function"], size):
        return sdpa_mask(*args, **kwargs)
    positions = kwargs.get("cache_position")  # transformers before 5
    return Window.of(size, positions.device if positions is not None else kwargs.get("device"))


def _slides(mask: Any, size: int) -> bool:
    """Whether it is the mask of a sliding window: chunks have a size too."""
    pairs = {(size, 0): False, (size, 1): True, (2 * size - 1, size): True, (0, 1): False}
    none = torch.zeros((), dtype=torch.long)
    return all(
        bool(mask(none, none, none + query, none + key)) is seen
        for (query, key), seen in pairs.items()
    )


def in_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Torch's attention; below a `Window` block by block.

    Args:
        module: the attention's module.
        query: ``[B, H, T, C]``.
        key: ``[B, G, T, C]``, whose heads are shared.
        value: like ``key``.
        attention_mask: a mask, a `Window` or None.
        **kwargs: dropout, scaling and others of transformers.

    Returns:
        ``[B, T, H, C]``, and no weights.
    """
    if not isinstance(attention_mask, Window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError("window_attention=True: attention dropout is not supported; set it to 0.")
    rows, heads, length, _ = query.shape
    size = attention_mask.size
    of_first = (x[:, :, :size] for x in (query, key, value))
    first, _ = sdpa_attention_forward(module, *of_first, None, **{**kwargs, "is_causal": True})
    query, key, value = (_blocks(x, size) for x in (query, key, value))
    key, value = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (key, value))
    at = torch.arange(2 * size, device=query.device)
    ahead = at - at[:size, None]  # from the key at a query's own place in the block before
    mask = ((ahead > 0) & (ahead <= size))[None, None]
    rest, _ = sdpa_attention_forward(module, query[:, 1:].flatten(0, 1), key, value, mask, **kwargs)
    rest = rest.reshape(rows, -1, heads, rest.shape[-1])
    return torch.cat([first, rest], 1)[:, :length], None


def _blocks(states: Tensor, size: int) -> Tensor:
    """``[B, H, T, C]`` → ``[B, blocks, H, size, C]``, padded at the end."""
    padded = F.pad(states, (0, 0, 0, -states.shape[2] % size))
    return padded.unflatten(2, (-1, size)).transpose(1, 2)
