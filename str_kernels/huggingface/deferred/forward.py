"""Replaces the ``forward`` of one module instance, and restores it.

The replacement is a bound method and no closure, so that ``copy.deepcopy`` (a reference model,
PEFT's ``modules_to_save``) binds it to the copy. It calls what was there before, such as
accelerate's hooks.

A bound method is pickled by its name, and would come back as the class's own ``forward``; so a
module with a replacement refuses to be pickled.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

from torch import nn

PATCH = "_str_kernels_patch"  # the attribute of a model under which its patch is stored
_INNER = "_str_kernels_inner_forward"
_REPLICATE = "_replicate_for_data_parallel"  # the method by which nn.DataParallel copies a module


class _Below:
    """What a replacement covers: the ``forward`` of the instance, or None for that of its class.

    Attributes:
        forward: the covered one.
        function: the replacement, called with the module and its arguments.
        active: whether the replacement was not removed; below a newer wrapper it only passes on.
    """

    def __init__(
        self,
        forward: Callable[..., Any] | None,
        function: Callable[..., Any],
        *,
        active: bool = True,
    ) -> None:
        self.forward, self.function, self.active = forward, function, active

    def __deepcopy__(self, memo: dict) -> _Below:
        return _Below(copy.deepcopy(self.forward, memo), self.function, active=self.active)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if not self.active:
            return type(None), ()
        raise pickle.PicklingError(
            "save with model.save_pretrained(folder) or torch.save(model.state_dict(), path); to "
            "send it elsewhere, call unpatch_model(model) first and patch_model there "
            "(patch.state_dict() is what it has learned): a patched model cannot be pickled, for "
            "it would come back without its patch."
        )


def install_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make ``module.forward(...)`` call ``function(module, ...)``, in place of an earlier one."""
    if is_installed(module):
        below = module.__dict__[_INNER]
        below.function, below.active = function, True
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        below = self.__dict__.get(_INNER)
        if below is None or not below.active:  # whoever kept this method calls on after its removal
            return inner_forward(self)(*args, **kwargs)
        return below.function(self, *args, **kwargs)

    functools.update_wrapper(forward, type(module).forward)
    # generate() and Trainer read the signature; accelerate would follow __wrapped__ past the patch
    forward.__signature__ = inspect.signature(type(module).forward)
    del forward.__wrapped__
    forward._str_kernels = True
    module.__dict__[_INNER] = _Below(module.__dict__.get("forward"), function)
    module.__dict__["forward"] = types.MethodType(forward, module)
    module.__dict__[_REPLICATE] = _refuse_data_parallel


def _refuse_data_parallel() -> None:
    """Stand for the method on a module whose replicas would all call this one's forward.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "DataParallel copies a module with its replaced forward, so that every GPU would run the "
        "first one's weights: start one process a GPU (torchrun, accelerate launch), or let "
        "CUDA_VISIBLE_DEVICES name one GPU."
    )


def inner_forward(module: nn.Module) -> Callable[..., Any]:
    """``module.forward`` without the replacement."""
    below = module.__dict__.get(_INNER)
    inner = module.__dict__.get("forward") if below is None else below.forward
    return functools.partial(type(module).forward, module) if inner is None else inner


def is_installed(module: nn.Module) -> bool:
    """Whether ``install_forward`` was called and not undone."""
    return module.__dict__.get(_INNER) is not None


def installed_function(module: nn.Module) -> Callable[..., Any] | None:
    """What ``install_forward`` made the module call; None: nothing."""
    below = module.__dict__.get(_INNER)
    return None if below is None else below.function


def has_own_forward(module: nn.Module) -> bool:
    """Whether ours is still the outermost ``forward`` of the instance."""
    forward = module.__dict__.get("forward")
    return getattr(getattr(forward, "__func__", None), "_str_kernels", False)


def remove_forward(module: nn.Module) -> None:
    """Undo ``install_forward``; below a newer wrapper, ours stays and only passes on."""
    if not is_installed(module):
        return
    if not has_own_forward(module):
        module.__dict__[_INNER].active = False
        return
    inner = module.__dict__.pop(_INNER).forward
    module.__dict__.pop(_REPLICATE, None)
    del module.__dict__["forward"]
    if inner is not None:
        module.__dict__["forward"] = inner
