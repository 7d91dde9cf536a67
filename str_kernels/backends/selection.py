"""Choose backend, screen and filter, and log each choice once with its reason."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache

import torch

from str_kernels.backends.torch import TorchBackend
from str_kernels.engine.contract import Backend, Resolved
from str_kernels.notices import say_once
from str_kernels.options import LossOptions

BACKEND_NAMES = ("auto", "triton", "torch", "dense")
OLDEST_TRITON = (3, 4)
# A tile with less than this share of a row's open probability is approximated by its mean row. On
# ten real data sets the gradient's error was 0.05 to 0.33 %, at most a third of a bf16 head's.
DEFAULT_EPS = 2.0**-11
MANY_ROWS = 4096  # the log names the "auto" screen of so many rows; fewer may get another
_TORCH = TorchBackend()


def check_backend(backend: str | Backend) -> None:
    """Raise ValueError unless this is one of ``BACKEND_NAMES`` or a ``Backend``."""
    if isinstance(backend, type) or not isinstance(backend, str | Backend):
        raise ValueError(f"backend={backend!r}: must be a name or a Backend instance.")
    if backend == "reference":
        raise ValueError("backend='reference': version 0.2 renamed it; use backend='dense'.")
    if isinstance(backend, str) and backend not in BACKEND_NAMES:
        allowed = ", ".join(map(repr, BACKEND_NAMES))
        raise ValueError(f"backend={backend!r}: must be one of {allowed}, or a Backend instance.")


def select_backend(
    backend: str | Backend, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Backend | None, str]:
    """Choose a backend by name, or take the instance that was given; return it and the reason.

    ``"auto"`` is Triton on a CUDA or ROCm device that Triton supports, and torch elsewhere; None is
    the materialised oracle.

    Raises:
        ValueError: an unknown name, or Triton by name where it cannot run.
    """
    check_backend(backend)
    chosen, reason = backend, "given as an instance"
    if isinstance(backend, str):
        chosen, reason = _by_name(backend, device, dtype)
    name = "dense" if chosen is None else chosen.name
    say_once(f"str_kernels runs the {name} backend ({reason})")
    return chosen, reason


def resolve(
    options: LossOptions,
    backend: str | Backend,
    *,
    dtype: torch.dtype,
    device: torch.device,
    indexed: bool,
    entropy: bool = False,
    needs: tuple[bool, bool, bool] = (False, False, False),
    positions: int = MANY_ROWS,
) -> Resolved:
    """Choose backend, filter and screen; ``indexed``: there is an index; the rest as `Resolved`.

    ``filter_eps="auto"`` is ``DEFAULT_EPS`` with a vocabulary index or a cheaper screen by name,
    and 0 otherwise: in token order the filter's error can exceed that of a bf16 head. With an index
    it is 0 as well for so few ``positions`` that the exact pass is faster (``Backend.filters``).

    Raises:
        ValueError: as of ``select_backend``, or the backend cannot run the screen here.
    """
    chosen, backend_reason = select_backend(backend, device, dtype)
    if chosen is None:
        return Resolved(None, options, needs, dtype, backend_reason=backend_reason)
    if options.screen != "auto":
        refusal = chosen.refuses(options.screen, dtype, device)
        if refusal is not None:
            raise ValueError(f"screen={options.screen!r}: {refusal}.")
    eps, reason = options.filter_eps, "asked for"
    if eps == "auto":
        cheaper = options.screen not in ("auto", "exact")
        filtered = indexed or cheaper
        eps = DEFAULT_EPS if filtered else 0.0
        reason = "'auto' with an index" if filtered else "'auto' without a vocabulary index"
        if filtered and not cheaper and not chosen.filters(dtype, device, positions):
            eps, reason = 0.0, "'auto' with an index, and fewer positions than repay it"
    if eps and options.softcap is not None and options.label_smoothing:
        eps, reason = 0.0, "label smoothing under a softcap needs every logit"
    if eps and entropy:
        eps, reason = 0.0, "the entropy needs every logit"
    screen = options.screen if eps else "exact"
    auto = screen == "auto"
    if auto:
        screen = chosen.auto_screen(dtype, device, MANY_ROWS)
    say_once(f"str_kernels: filter_eps={eps:g}, screen={screen} ({reason})")
    return Resolved(
        chosen, options, needs, dtype, eps, screen, auto, entropy, backend_reason, reason
    )


def _by_name(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend | None, str]:
    if name == "torch":
        return _TORCH, "asked for by name"
    if name == "dense":
        return None, "asked for by name: materialises every logit"
    if name == "auto" and device.type != "cuda":
        return _TORCH, f"'auto' on {device.type}: Triton is for CUDA and ROCm"
    refusal = _no_triton()
    if refusal is None:
        backend = _triton()
        refusal = backend.refuses("exact", dtype, device)
        if refusal is None:
            return backend, "asked for by name" if name == "triton" else f"'auto' on {device.type}"
    if name == "triton":
        raise ValueError(f"backend='triton': {refusal}; use 'auto' or 'torch'.")
    return _TORCH, f"'auto' on {device.type}: {refusal}"


def _no_triton() -> str | None:
    """Say why the Triton backend cannot be imported; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@cache
def _triton() -> Backend:
    return importlib.import_module("str_kernels.backends.triton").TritonBackend()
