"""Gradient checkpointing, and where the kept inputs of the layers wait for the backward.

Stage: transformers' own checkpointing → its function, inside hooks of torch's that move away what a
layer keeps: tensors with a gradient, so that a mask that all layers share is not copied for each.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

_FUNCTION = "_gradient_checkpointing_func"  # transformers' name, on every checkpointed module
_STATE = ("gradient_checkpointing", _FUNCTION)


@contextmanager
def checkpointed(model: nn.Module, offload: str | saved_tensors_hooks | None) -> Iterator[None]:
    """Checkpoint every layer in this block; their inputs wait on the device, "cpu" or "disk".

    Hooks of your own say where else.

    Raises:
        ValueError: a model without checkpointing, or ``"cpu"`` for a model that is there already.
    """
    device = next(model.parameters()).device
    if offload == "cpu" and device.type == "cpu":
        raise ValueError(
            "offload='cpu': the model is on the CPU, and so are its checkpoints; give 'disk' or "
            "leave it out."
        )
    before = [(m, {n: m.__dict__[n] for n in _STATE if n in m.__dict__}) for m in model.modules()]
    had_hook = getattr(model, "_require_grads_hook", None) is not None
    enable_checkpointing(model)
    hook = None
    if offload is not None:
        hooks = _hooks(offload, device)

        def wrap(*_: Any) -> None:  # a trainer that enables checkpointing puts its function back
            for module in model.modules():
                function = module.__dict__.get(_FUNCTION)
                if function is not None and not isinstance(function, Offloading):
                    module.__dict__[_FUNCTION] = Offloading(function, hooks)

        wrap()
        hook = model.register_forward_pre_hook(wrap)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        if not had_hook and getattr(model, "_require_grads_hook", None) is not None:
            model.disable_input_require_grads()
        for module, state in before:
            for name in _STATE:
                module.__dict__.pop(name, None)
            module.__dict__.update(state)


def enable_checkpointing(model: nn.Module) -> None:
    """Switch transformers' checkpointing on, without reentrance.

    Raises:
        ValueError: a model that has none.
    """
    # Transformers renamed the method; the keywords of torch's checkpoint come first in both.
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of an override with the old name
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(f"gradient_checkpointing=True: {error}") from error


class Offloading:
    """A checkpointing function whose kept tensors with a gradient are moved away meanwhile."""

    def __init__(self, checkpoint: Callable[..., Any], hooks: saved_tensors_hooks) -> None:
        """Wrap transformers' function."""
        self._checkpoint, self._hooks = checkpoint, hooks

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint; inside the layer torch's own hooks lie above these."""
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._checkpoint(function, *args, **kwargs)

    def _pack(self, tensor: Tensor) -> Any:
        # a mask or the positions are one tensor for all layers
        return self._hooks.pack_hook(tensor) if tensor.requires_grad else tensor

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self._hooks.unpack_hook(packed)


def _hooks(offload: str | saved_tensors_hooks, device: torch.device) -> saved_tensors_hooks:
    if isinstance(offload, saved_tensors_hooks):
        return offload
    if offload == "disk":
        return saved_tensors_hooks(OnDisk, lambda kept: kept.read())
    return save_on_cpu(pin_memory=device.type == "cuda", device_type=device.type)


class OnDisk:
    """A tensor in a temporary file, which the system removes with its last user."""

    def __init__(self, tensor: Tensor) -> None:
        """Write it."""
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tofile(self._file)

    def read(self) -> Tensor:
        """Read it back onto its device; a second backward reads it again."""
        self._file.seek(0)
        values = torch.empty(self._shape, dtype=self._dtype)
        self._file.readinto(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
        return values.to(self._device)
