"""Preserves a model over a trial run: whatever its forward changes is restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from str_kernels.huggingface.deferred.modes import evaluates_otherwise

# A larger buffer is a table or a quantised weight, which no forward writes.
_LARGEST_BUFFER = 2**20
_NO_DRAWS = ("cpu", "meta")  # devices without random numbers of their own


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with gradients and without autocast; restored afterwards.

    Every module gets its attributes back (its mode, hooks and submodules among them: some models
    change their attention at a short input), and its buffers get their values back.
    """
    modules = [(module, _state(module)) for module in model.modules()]
    buffers = [
        (buffer, buffer._version, buffer.detach().clone())
        for buffer in model.buffers()
        if not buffer.is_inference() and buffer.numel() <= _LARGEST_BUFFER
    ]
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            for module, _ in modules:
                module.training &= evaluates_otherwise(module)
            yield
    finally:
        for module, state in modules:
            _restore(module, state)
        for buffer, seen, values in buffers:
            if buffer._version != seen:
                with torch.no_grad():
                    buffer.copy_(values)


@contextmanager
def preserved_draws(model: nn.Module) -> Iterator[None]:
    """Restores the state of the random numbers after this block."""
    devices = sorted(
        {p.device for p in model.parameters() if p.device.type not in _NO_DRAWS}, key=str
    )
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        yield


def _state(module: nn.Module) -> dict[str, tuple[Any, dict | None]]:
    """Every attribute, with a copy of those that are dicts (parameters, hooks, submodules)."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, state: dict[str, tuple[Any, dict | None]]) -> None:
    module.__dict__.clear()
    for name, (value, content) in state.items():
        module.__dict__[name] = value
        if content is not None and not _same(value, content):
            value.clear()
            value.update(content)


def _same(value: dict, content: dict) -> bool:
    return list(value) == list(content) and all(value[k] is content[k] for k in content)
