"""Which backend runs, which screen, which filter, and why not another; said once in the log."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from str_kernels.backends.contract import Backend
from str_kernels.backends.torch_blocked import TorchBlocked
from str_kernels.options import LossOptions

_log = logging.getLogger("str_kernels")
_said: set[str] = set()

BACKEND_NAMES = ("auto", "torch", "reference")
# The share of a row's open probability below which a tile is approximated by its mean row: on ten
# real sets 0.05 to 0.33 % error in the gradient, a third of a bf16 head's at most.
DEFAULT_EPS = 2.0**-11
_TORCH = TorchBlocked()


class Selection(NamedTuple):
    """The chosen backend (None: the materialised oracle) and the reason for it."""

    backend: Backend | None
    reason: str


class Filter(NamedTuple):
    """The resolved precision: ``eps`` 0 is the exact pass, else ``screen`` names the screen."""

    eps: float
    screen: str
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
    name = "reference" if choice.backend is None else choice.backend.name
    _say_once(f"str_kernels runs the {name} backend ({choice.reason})")
    return choice


def select_filter(
    options: LossOptions,
    backend: Backend,
    *,
    indexed: bool,
    entropy: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Filter:
    """Resolve ``filter_eps`` and ``screen``.

    ``filter_eps="auto"`` is ``DEFAULT_EPS`` with a vocabulary index or a screen asked for by name,
    and exact otherwise: in token order the filter's error can pass that of a bf16 head.

    Raises:
        ValueError: a screen that the backend cannot run here.
    """
    if options.screen != "auto":
        refusal = backend.refuses(options.screen, dtype, device)
        if refusal is not None:
            raise ValueError(f"screen={options.screen!r}: {refusal}.")
    eps, reason = options.filter_eps, "asked for"
    if eps == "auto":
        filtered = indexed or options.screen not in ("auto", "exact")
        eps = DEFAULT_EPS if filtered else 0.0
        reason = "'auto' with an index" if filtered else "'auto' without a vocabulary index"
    if eps and options.softcap is not None and options.label_smoothing:
        eps, reason = 0.0, "label smoothing under a softcap needs every logit"
    if eps and entropy:
        eps, reason = 0.0, "the entropy needs every logit"
    if eps == 0.0:
        choice = Filter(0.0, "exact", reason)
    else:
        screen = options.screen
        choice = Filter(
            eps, backend.auto_screen(dtype, device) if screen == "auto" else screen, reason
        )
    _say_once(f"str_kernels: filter_eps={choice.eps:g}, screen={choice.screen} ({reason})")
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


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.info(message)
