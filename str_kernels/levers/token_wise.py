"""Finds the modules that treat each token alone, by trying them on a few tokens.

Stage: one forward of the model, recorded → modules ``[B, T, D] → [B, T, D']`` that keep much beside
their input → those whose output on a slice of the tokens is the slice of their output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from str_kernels.huggingface.deferred.forward import inner_forward
from str_kernels.huggingface.deferred.head import vocabulary_size
from str_kernels.huggingface.deferred.modes import evaluates_otherwise
from str_kernels.huggingface.patch.model_state import preserved_draws, preserved_state
from str_kernels.huggingface.patch.verify import trial_inputs
from str_kernels.levers.tiles import is_states

_PRODUCTS = 1.5  # a module with fewer weights, in units of D x D', has nothing inside to save
_KEPT = 0.5  # of the input's bytes: what tiles must save at least
_ROUNDING = 8  # of the dtype's steps and its sums', between products of some tokens and of others
_DRAWN = 999_983  # random numbers; a prime, so that no row of weights is another
_TRIED = 4  # tokens
_OTHERWISE = -37.0  # what the other tokens are multiplied by: outliers, too


class _Call(NamedTuple):
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def values(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]


def token_wise_modules(model: nn.Module, *, every: bool = False) -> dict[str, nn.Module]:
    """The outermost modules that can run over any slice of the tokens, by name.

    They are those with the weights of at least two products. A module of a kind that was tried
    already is not tried again. Modules on the meta device are tried as copies with random weights.

    Args:
        model: a transformers causal LM, without PEFT's wrapper; restored afterwards.
        every: also those whose backward keeps much beside their input.

    Raises:
        ValueError: there is none, or one is random or stateful in training mode: it is named.
    """
    calls, found, worth, verdicts = _recorded(model), {}, {}, {}
    with preserved_state(model), preserved_draws(model), torch.no_grad():
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if inside or module not in calls or not _maps_tokens(calls[module]):
                continue
            kind = _kind(module)
            if kind not in worth:
                worth[kind] = _has_an_inside(module, calls[module]) or (
                    every and _keeps_much(module, calls[module])
                )
            if not worth[kind]:
                continue
            if kind not in verdicts:
                verdicts[kind] = _judge(name, module, calls[module])
            if verdicts[kind]:
                found[name] = module
    if not found:
        raise ValueError(
            f"tile_tokens: no module of {type(model).__name__} treats each token of [B, T, D] "
            "alone, so nothing can run in tiles; leave it out."
        )
    return found


def _recorded(model: nn.Module) -> dict[nn.Module, _Call]:
    """The call of each module that one forward calls once, the model and its head left out."""
    calls: dict[nn.Module, list[_Call]] = {}
    head = model.get_output_embeddings()

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.setdefault(module, []).append(_Call(args, kwargs, output))

    hooks, inputs = [], trial_inputs(model, vocabulary_size(head))
    if inputs["input_ids"].is_meta and "attention_mask" in inputs:
        rows, length = inputs["input_ids"].shape  # the values of a mask [B, T] would be read
        inputs["attention_mask"] = torch.zeros(rows, 1, length, length, device="meta")
    with preserved_state(model), preserved_draws(model), torch.no_grad():
        for module in model.modules():
            if module is not model and module is not head:
                hooks.append(module.register_forward_hook(record, with_kwargs=True))
        try:
            inner_forward(model)(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return {module: made[0] for module, made in calls.items() if len(made) == 1}


def _maps_tokens(call: _Call) -> bool:
    """Whether a module maps ``[B, T, D]``, once or more often, to ``[B, T, D']``."""
    values = [*call.values, call.output]
    if len(values) < 2 or not all(map(is_states, values)):
        return False
    return all(x.shape[:2] == call.output.shape[:2] for x in values)


def _has_an_inside(module: nn.Module, call: _Call) -> bool:
    """Whether it has more weights than one product has."""
    product = max(x.shape[-1] for x in call.values) * call.output.shape[-1]
    return sum(p.numel() for p in module.parameters()) > _PRODUCTS * product


def _keeps_much(module: nn.Module, call: _Call) -> bool:
    """Whether its backward reads much that is neither its input nor a weight or a buffer."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_().clone() for x in call.values]  # none is a leaf
    known = {x.untyped_storage()._cdata for x in (*inputs, *module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        output = _runner(module, call)(*inputs)
    kept.pop(output.untyped_storage()._cdata, None)
    return sum(kept.values()) > _KEPT * sum(x.nbytes for x in inputs)


def _kind(module: nn.Module) -> tuple:
    parameters = (
        (n, p.shape, p.dtype, p.requires_grad, type(p)) for n, p in module.named_parameters()
    )
    return (type(module), tuple(type(m) for m in module.modules()), *parameters)


def _judge(name: str, module: nn.Module, call: _Call) -> bool:
    """Whether the module is token-wise.

    Raises:
        ValueError: it is in evaluation mode alone.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        module, call = _made_real(module, call)
    run, near = _runner(module, call), _Near(module)
    try:
        if not _each_token_alone(run, call.values, near):
            return False
    # it cannot run on other tokens than it was given
    except (RuntimeError, ValueError, IndexError):
        return False
    with _training(module):
        first = run(*call.values)
        before, draws = _state(module), _draws(first.device)
        second = run(*call.values)
        if _state(module) != before:
            what = "writes into itself when it runs"
        # by the generator, too: an adapter that begins at zero hides its dropout
        elif _draws(first.device) != draws or not near(second, first):
            what = "draws random numbers in training (dropout? set it to 0)"
        elif not _each_token_alone(run, call.values, near):
            what = "mixes tokens in training (statistics of a batch?)"
        else:
            return True
    raise ValueError(
        f"tile_tokens: {name}, a {type(module).__name__}, {what}, so its output in tiles would not "
        "be its output; leave the tiles out."
    )


def _runner(module: nn.Module, call: _Call) -> Callable[..., Tensor]:
    names, count = list(call.kwargs), len(call.args)
    forward = inner_forward(module)

    def run(*values: Tensor) -> Tensor:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return run


def _each_token_alone(
    run: Callable[..., Tensor], values: list[Tensor], near: Callable[[Tensor, Tensor], bool]
) -> bool:
    """Whether slices of the tokens give slices of the output, whatever the other tokens are."""
    whole, half = run(*values), values[0].shape[1] // 2
    pairs = zip(*(map(Tensor.contiguous, x.tensor_split([half], 1)) for x in values), strict=True)
    parts = [run(*pair) for pair in pairs]
    other = [torch.cat([x[:, :half], x[:, half:] * _OTHERWISE], 1) for x in values]
    alone = run(*other)[:, :half]
    return near(torch.cat(parts, 1), whole) and near(alone, whole[:, :half])


class _Near:
    """Whether two outputs of a module agree to rounding; written so that NaN does not.

    A library sums a product of few rows in another order than one of many, which changes it by
    the root of its terms in steps of the sum's dtype, fp32 or finer.
    """

    def __init__(self, module: nn.Module) -> None:
        weights = (p for p in module.parameters() if p.is_floating_point())  # others are packed
        terms = max((max(p.shape, default=1) for p in weights), default=1)
        self._summed = terms**0.5 * torch.finfo(torch.float32).eps

    def __call__(self, got: Tensor, want: Tensor) -> bool:
        step = torch.finfo(want.dtype).eps
        got, want = (x.cpu().double() for x in (got, want))  # a device may have no fp64
        return bool((got - want).norm() <= _ROUNDING * (step + self._summed) * want.norm())


def _draws(device: torch.device) -> list[bytes]:
    """The states of the generators that a module on this device draws from."""
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "mps", "xpu"):
        states.append(torch.get_device_module(device).get_rng_state())
    return [state.numpy().tobytes() for state in states]


def _state(module: nn.Module) -> list[tuple]:
    """Whatever a call could leave in a module: its attributes, and versions of its buffers."""
    found = []
    for inside in module.modules():
        found += [(key, id(value)) for key, value in inside.__dict__.items()]
        found += [(key, id(x), x._version) for key, x in inside._buffers.items() if x is not None]
    return found


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """The module in training mode; `preserved_state` restores it."""
    inside = [m for m in module.modules() if not evaluates_otherwise(m)]
    before = [m.training for m in inside]
    for m in inside:
        m.training = True
    try:
        yield
    finally:
        for m, mode in zip(inside, before, strict=True):
            m.training = mode


def _made_real(module: nn.Module, call: _Call) -> tuple[nn.Module, _Call]:
    """A copy on the CPU with random weights, and random inputs of the call's widths.

    It is as large as the module, so all is made quickly: float32, some random numbers repeated.
    """
    draw = torch.Generator().manual_seed(0)
    module = copy.deepcopy(module).float().to_empty(device="cpu")
    numbers = torch.randn(_DRAWN, generator=draw)
    for x in (*module.parameters(), *module.buffers()):
        if x.is_floating_point():
            scale = x.shape[-1] ** -0.5 if x.dim() else 1.0
            for part in x.view(-1).split(_DRAWN):
                torch.mul(numbers[: len(part)], scale, out=part)
    made = [torch.randn(1, _TRIED, x.shape[-1], generator=draw) for x in call.values]
    args, rest = tuple(made[: len(call.args)]), made[len(call.args) :]
    return module, _Call(args, dict(zip(call.kwargs, rest, strict=True)), call.output)
