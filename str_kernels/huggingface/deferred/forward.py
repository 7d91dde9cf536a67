"""Replaces the ``forward`` of one module instance, and restores it.

The replacement is a bound method and no closure, so that ``copy.deepcopy`` (a reference model,
PEFT's ``modules_to_save``) binds it to the copy. It calls what was there before, such as
accelerate's hooks.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

PATCH = "_str_kernels_patch"  # the attribute of a model under which its patch is stored
_INNER = "_str_kernels_inner_forward"


def install_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make ``module.forward(...)`` call ``function(module, ...)``; a second call does nothing."""
    if _INNER in module.__dict__:
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    functools.update_wrapper(forward, type(module).forward)
    # generate() and Trainer read the signature; accelerate would follow __wrapped__ past the patch
    forward.__signature__ = inspect.signature(type(module).forward)
    del forward.__wrapped__
    forward._str_kernels = True
    module.__dict__[_INNER] = module.__dict__.get("forward")
    module.__dict__["forward"] = types.MethodType(forward, module)


def inner_forward(module: nn.Module) -> Callable[..., Any]:
    """``module.forward`` without the replacement."""
    inner = module.__dict__.get(_INNER if _INNER in module.__dict__ else "forward")
    return functools.partial(type(module).forward, module) if inner is None else inner


def is_installed(module: nn.Module) -> bool:
    """Whether ``install_forward`` was called and not undone."""
    return _INNER in module.__dict__


def has_own_forward(module: nn.Module) -> bool:
    """Whether ours is still the outermost ``forward`` of the instance."""
    forward = module.__dict__.get("forward")
    return getattr(getattr(forward, "__func__", None), "_str_kernels", False)


def remove_forward(module: nn.Module) -> None:
    """Undo ``install_forward``; below a newer wrapper, ours stays and only passes on."""
    if not is_installed(module) or not has_own_forward(module):
        return
    inner = module.__dict__.pop(_INNER)
    del module.__dict__["forward"]
    if inner is not None:
        module.__dict__["forward"] = inner
