"""`Applied`: the levers of one model, in force until they are undone."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

from torch import nn

from str_kernels.huggingface.deferred.head import causal_lm
from str_kernels.levers.checkpoints import checkpointed
from str_kernels.levers.tiles import tiled
from str_kernels.levers.token_wise import token_wise_modules
from str_kernels.levers.windows import windowed

_with_levers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Applied:
    """Levers in force; as a context manager it undoes them on leaving.

    Attributes:
        tiled: the names of the modules that run in tiles.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_checkpointing: bool,
        offload: str | None,
        tile_tokens: int | None,
        window_attention: bool,
        tile_all: bool,
    ) -> None:
        """Check and install; ``LongContext.apply`` calls it, and says what the arguments mean."""
        self.tiled: tuple[str, ...] = ()
        inner = causal_lm(model)
        if inner in _with_levers:
            raise ValueError(
                f"model={type(inner).__name__}: levers are applied already; call undo() of what "
                "apply() returned, then apply others."
            )
        with ExitStack() as stack:
            if tile_tokens is not None:
                found = token_wise_modules(inner, every=tile_all)
                self.tiled = tuple(found)
                stack.enter_context(tiled(inner, list(found.values()), tile_tokens))
            if window_attention:
                stack.enter_context(windowed(inner))
            if gradient_checkpointing:
                stack.enter_context(checkpointed(inner, offload))
            _with_levers.add(inner)
            stack.callback(_with_levers.discard, inner)
            self._stack = stack.pop_all()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the model; harmless when done already."""
        self._stack.close()
