"""Compare one architecture, patched and unpatched, in everything that a user would notice."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.architectures.tiny_configs import VOCAB, build_architecture
from str_kernels.huggingface import DeferredLogits, patch_model, unpatch_model
from str_kernels.huggingface.deferred import recording
from str_kernels.huggingface.patch.loss import LabelledForward

ROWS, LENGTH, NEW = 2, 12, 5
MODES = ("eval", "train")
NEED_AN_IMAGE = {"git", "vision-encoder-decoder", "idefics", "kosmos-2"}
# fp32: sums of a few thousand products in another order, 2^-24 each, through a few layers
TOLERANCE = 2e-5
# a gradient is compared to its own size, or to this part of the largest one: what is smaller than
# that is the little that is left of larger terms, rounded as they are
FLOOR = 1e-3


@dataclass
class Finding:
    """What the comparison found of one architecture.

    Attributes:
        outcome: ``fused``, ``falls back`` (right, by way of the real logits), ``refused``,
            ``not built``, ``not run`` (without the patch, on token ids alone), or ``wrong``.
        reason: why not fused.
        errors: the largest relative difference of the loss, of any gradient, of the logits, in
            evaluation and in training mode.
        scaled: whether its logits are scaled or capped.
        fault_seen: whether the comparison fails when that scale is dropped.
        generates: greedy tokens equal; None: the model cannot generate from token ids.
    """

    model_type: str
    task: str
    kind: str = ""
    outcome: str = "not built"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    scaled: bool = False
    fault_seen: bool | None = None
    generates: bool | None = None

    def as_row(self) -> dict[str, Any]:
        """Return plain JSON types."""
        row = asdict(self)
        return row | {"errors": {name: float(f"{x:.2g}") for name, x in self.errors.items()}}


def examine(model_type: str, task: str = "causal") -> Finding:
    """Build, patch, compare, unpatch; what the model raises becomes the outcome."""
    found = Finding(model_type, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build_architecture(model_type, task)
            found.kind = type(model).__name__
            inputs = make_inputs(model)
            want = {mode: measure(model, inputs, mode) for mode in MODES}
            again = {mode: measure(model, inputs, mode) for mode in MODES}
            tokens = generate(model, inputs)
        except Exception as error:
            found.outcome = "not run" if found.kind else "not built"
            found.reason = _one_line(error)
            return found
        try:
            _compare(found, model, inputs, (want, again), tokens)
        except ValueError as error:
            found.outcome, found.reason = "refused", _one_line(error)
    return found


def _compare(
    found: Finding, model: nn.Module, inputs: dict, twice: tuple[dict, dict], tokens: Tensor | None
) -> None:
    want, again = twice
    keys = list(model.state_dict())
    with watched() as seen:
        patch = patch_model(model)
        got = {mode: measure(model, inputs, mode) for mode in want}
        torch.manual_seed(7)
        outputs = model(**inputs)
    found.scaled = seen["scaled"]
    for mode, values in want.items():
        found.errors |= _differences(mode, values, got[mode], again[mode])
    found.errors["logits"] = relative(values_of(outputs.logits), want["eval"]["logits"])
    if tokens is not None:
        found.generates = torch.equal(generate(model, inputs), tokens)
    faults = [name for name, x in found.errors.items() if not x <= TOLERANCE]
    faults += ["state dict"] * (list(model.state_dict()) != keys)
    faults += ["generate"] * (found.generates is False)
    patch.unpatch()
    faults += ["unpatch"] * isinstance(model(**inputs).logits, DeferredLogits)
    if found.scaled:
        found.fault_seen = _sees_a_dropped_scale(model, inputs, want["eval"])
        faults += ["planted fault"] * (not found.fault_seen)
    found.outcome = "fused" if patch.last_parts is not None and not seen["built"] else "falls back"
    found.reason = "" if found.outcome == "fused" else _why(seen)
    if faults:
        found.outcome, found.reason = "wrong", ", ".join(faults)


def make_inputs(model: nn.Module) -> dict[str, Any]:
    """Make token ids, a mask with padding after the second row, labels without the prompt."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCAB - 10, (ROWS, LENGTH), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    mask[1, -2:], labels[1, -2:] = 0, -100
    inputs = {"input_ids": ids, "labels": labels}
    if model.config.model_type.startswith("musicgen"):  # rows of ids for each of its codebooks
        books = model.config.num_codebooks
        inputs = {
            "input_ids": ids.repeat_interleave(books, 0),
            "labels": labels[..., None].repeat(1, 1, books),
        }
    accepted = inspect.signature(type(model).forward).parameters
    optional = {"attention_mask": mask}
    if "language_model" in dict(model.named_children()) | dict(model.base_model.named_children()):
        optional["token_type_ids"] = torch.zeros_like(ids)
    if model.config.model_type == "molmo2":
        optional["mm_token_type_ids"] = torch.zeros_like(ids)
    pixels = accepted.get("pixel_values")
    needed = pixels is not None and pixels.default is pixels.empty
    if needed or model.config.model_type in NEED_AN_IMAGE:
        optional["pixel_values"] = torch.rand(ROWS, 3, 16, 16, generator=g)
    return inputs | {name: x for name, x in optional.items() if name in accepted}


def measure(model: nn.Module, inputs: dict[str, Any], mode: str) -> dict[str, Tensor]:
    """Return loss, logits and every gradient by name; the random draws are always the same."""
    model.train(mode == "train")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    outputs = model(**inputs)
    if mode == "train" or model.config.model_type != "reformer":  # which has none in evaluation
        outputs.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    logits = {} if isinstance(outputs.logits, DeferredLogits) else {"logits": outputs.logits}
    model.eval()
    return {"loss": outputs.loss.detach(), **logits, **found}


def generate(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """Return greedy tokens after a prompt; None if the model cannot make any."""
    prompt = inputs["input_ids"][:1, :6]
    try:
        return model.eval().generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False
        )
    except Exception:  # some need an image or another model: nothing to compare then
        return None


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Record what the patch does in this block: scales it folds, logits it builds and for whom."""
    seen: dict[str, Any] = {"scaled": False, "built": []}
    loss, read = LabelledForward.cross_entropy, LabelledForward.logits_read

    def cross_entropy(self: LabelledForward, fold: recording.Fold, *args: Any, **kwargs: Any):
        seen["scaled"] |= fold.logit_scale != 1.0 or fold.softcap is not None
        return loss(self, fold, *args, **kwargs)

    def logits_read(self: LabelledForward, by: str, size: int) -> None:
        seen["built"].append(by)
        read(self, by, size)

    with (
        mock.patch.object(LabelledForward, "cross_entropy", cross_entropy),
        mock.patch.object(LabelledForward, "logits_read", logits_read),
    ):
        yield seen


def _sees_a_dropped_scale(model: nn.Module, inputs: dict, want: dict[str, Tensor]) -> bool:
    """Return whether the comparison and the patch's own check notice a scale that is dropped."""
    with mock.patch.object(recording, "_times", lambda fold, other, divide: fold):
        patch_model(model, verify=False)
        got = measure(model, inputs, "eval")
        unpatch_model(model)
        try:
            patch_model(model).unpatch()
        except ValueError:
            return max(_differences("eval", want, got, want).values()) > TOLERANCE
    return False


def _differences(
    mode: str, want: dict[str, Tensor], got: dict[str, Tensor], again: dict[str, Tensor]
) -> dict[str, float]:
    """Return the loss's difference and the gradients' largest, without what is not reproducible.

    ``again`` is a second measurement without the patch, which shows what is not.
    """
    names = set(want) - {"logits"}
    if names != set(got) - {"logits"}:
        return {f"{mode} gradients": torch.inf}
    scale = max((want[name].norm() for name in names - {"loss"}), default=torch.tensor(1.0))
    errors = {
        name: relative(got[name], want[name], floor=FLOOR * scale)
        for name in names
        if relative(again[name], want[name], floor=FLOOR * scale) <= TOLERANCE
    }
    loss = errors.pop("loss", 0.0)
    return {f"{mode} loss": loss, f"{mode} gradients": max(errors.values(), default=0.0)}


def relative(got: Tensor, want: Tensor, floor: float | Tensor = 1e-12) -> float:
    """Return the norm of the difference, relative to that of ``want``."""
    if got.shape != want.shape:
        return torch.inf
    difference = torch.where(got == want, 0, got.double() - want.double())  # -inf masks are equal
    finite = torch.where(want.isfinite(), want, 0).double().norm()
    return (difference.norm() / finite.clamp(min=float(floor))).item()


def values_of(logits: Tensor) -> Tensor:
    """Return the values; deferred ones are computed."""
    return (logits.materialise() if isinstance(logits, DeferredLogits) else logits).detach()


def _why(seen: dict[str, Any]) -> str:
    readers = sorted(set(seen["built"]))
    if not readers:
        return "its logits do not come from one head"
    return f"its logits are read by {', '.join(readers)}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
