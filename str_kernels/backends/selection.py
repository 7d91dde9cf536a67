"""Which backend runs, and why not another; said once in the log."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from str_kernels.backends.contract import Backend
from str_kernels.backends.torch_blocked import TorchBlocked

_log = logging.getLogger("str_kernels")
_said: set[str] = set()

BACKEND_NAMES = ("auto", "torch", "reference")
_TORCH = TorchBlocked()


class Selection(NamedTuple):
    """The chosen backend (None: the materialised oracle) and the reason for it."""

    backend: Backend | None
    reason: str


def select_backend(backend: str | Backend, device: torch.device) -> Selection:
    """Choose by name, or take the instance that was given.

    Raises:
        ValueError: an unknown name, or one that this version does not have.
    """
    if isinstance(backend, str):
        choice = _by_name(backend, device)
    elif isinstance(backend, Backend):
        choice = Selection(backend, "given as an instance")
    else:
        raise ValueError(f"backend={backend!r}: must be a name or a Backend instance.")
    _say_once(choice)
    return choice


def _by_name(name: str, device: torch.device) -> Selection:
    if name == "auto":
        return Selection(
            _TORCH,
            f"'auto' on {device.type}: this version has no Triton kernels, torch runs anywhere",
        )
    if name == "torch":
        return Selection(_TORCH, "asked for by name")
    if name == "reference":
        return Selection(None, "asked for by name: materialises every logit")
    if name == "triton":
        raise ValueError(
            "backend='triton': this version has no Triton kernels yet; use 'auto' or 'torch'."
        )
    allowed = ", ".join(map(repr, BACKEND_NAMES))
    raise ValueError(f"backend={name!r}: must be one of {allowed}, or a Backend instance.")


def _say_once(choice: Selection) -> None:
    name = "reference" if choice.backend is None else choice.backend.name
    message = f"str_kernels runs the {name} backend ({choice.reason})"
    if message not in _said:
        _said.add(message)
        _log.info(message)
