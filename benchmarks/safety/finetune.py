"""Fine-tune the aligned model once by one method, with a record of every step.

Stage: aligned model, `Run` → LoRA trained with the package's patch → tuned model, `History`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.safety import baselines
from benchmarks.safety.align import set_rate
from benchmarks.safety.data import (
    ANCHOR_POOL,
    REFUSALS,
    anchor_rows,
    batches,
    built_in_rows,
    encode,
    load_split,
)
from benchmarks.safety.methods import Method, Run
from benchmarks.safety.probe import RunProbe
from benchmarks.safety.tokens import context_reference, token_ids
from str_kernels import SafetyConstraint, patch_model
from str_kernels.huggingface import Patch
from str_kernels.huggingface.constraint.anchors import join_anchors
from str_kernels.inputs.rows import Row
from str_kernels.inputs.template import DEFAULT_CHAT_TEMPLATE
from str_kernels.training.lora import add_lora

Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclass
class History:
    """What happened at every step: loss parts, gradient norm before clipping, seconds.

    A method that replaces the cross-entropy has its own objective in the latter's place.
    """

    cross_entropy: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float]]:
        """Return plain JSON types, four digits."""
        return {
            name: [float(f"{value:.4g}") for value in values]
            for name, values in asdict(self).items()
        }


def finetune(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    *,
    data: Path,
    work: Path,
    say: Callable[[str], None],
    aligned: torch.nn.Module | None = None,
    probe: RunProbe | None = None,
) -> tuple[torch.nn.Module, History]:
    """Tune ``model`` in place; return it with its adapter, and the history.

    ``aligned`` is the model that the constraint refers to, if ``model`` has been tuned before;
    ``probe`` is made from it, too.
    """
    setting, history = run.setting, History()
    features = encode(tokenizer, load_split(data, setting.task).train, setting.max_length)
    features = features[: setting.pool]
    refused = load_split(data, REFUSALS).train[: run.method.mixed]
    features += encode(tokenizer, refused, setting.max_length)
    unlearned = encode(
        tokenizer, _anchors(run.method, aligned or model, tokenizer, data), setting.max_length
    )
    known = [*features, *unlearned]
    safety, arguments = _constraint(run, aligned or model, tokenizer, features=known, work=work)
    torch.manual_seed(run.seed)
    tuned = add_lora(model, rank=setting.rank).train()
    with patch_model(tuned, safety, verify=False, **arguments) as patch:
        loss = _loss(run.method, tuned, tokenizer, work)
        optimizer = torch.optim.AdamW(p for p in tuned.parameters() if p.requires_grad)
        for step, batch in enumerate(_queue(run, features, unlearned, tokenizer.pad_token_id)):
            patch.sharing.begin(step)
            set_rate(optimizer, setting.learning_rate, step, setting.steps, setting.warmup)
            _step(batch, loss, optimizer, setting.max_grad_norm, history)
            _record(patch, history)
            if probe is not None:
                probe.after(tuned, step + 1)
            if step % 20 == 0 or step == setting.steps - 1:
                say(
                    f"{run.name} {step + 1}/{setting.steps}: "
                    f"cross-entropy {history.cross_entropy[-1]:.3f}, "
                    f"penalty {history.penalty[-1]:.3f}, {sum(history.seconds):.0f} s"
                )
    return tuned, history


def _anchors(
    method: Method, aligned: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path
) -> list[Row]:
    if method.anchors and method.built_in:
        return built_in_rows(aligned, tokenizer)
    return anchor_rows(data, ANCHOR_POOL) if method.anchors else []


def _queue(
    run: Run, features: list[dict], unlearned: list[dict], pad: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of a run, with anchors if it has them."""
    method, setting = run.method, run.setting
    order = {"steps": setting.steps, "pad": pad, "seed": run.seed}
    own = batches(features, size=setting.batch, **order)
    if not unlearned:
        yield from own
        return
    anchors = batches(unlearned, size=2 * method.anchors, **order)
    weighed = {"share": 1.0, "alone": True} if method.alone else {}
    for both in zip(own, anchors, strict=False):
        yield join_anchors(*both, method.positions, pad, **weighed)


def _constraint(
    run: Run,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    features: list[dict],
    work: Path,
) -> tuple[SafetyConstraint | None, dict[str, Any]]:
    """Return the constraint, and the patch's arguments that belong to it."""
    method, setting = run.method, run.setting
    if method.loss != "str":
        return None, {}
    safety = method.constraint(token_ids(method, model, tokenizer, work))

    def every() -> Iterator[dict[str, torch.Tensor]]:
        steps, pad = -(-len(features) // setting.batch), tokenizer.pad_token_id
        chunks = sorted(features, key=lambda f: len(f["input_ids"]))
        for start in range(0, steps * setting.batch, setting.batch):
            part = chunks[start : start + setting.batch]
            yield from batches(part, size=len(part), steps=1, pad=pad, seed=0)

    name = setting.task
    if method.anchors:
        name += "-built-in-anchors" if method.built_in else "-anchors"
    path = context_reference(model, safety, every, name, work)
    return safety, {**method.of_the_patch, "reference": path, "share_seed": run.seed}


def _loss(
    method: Method, tuned: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, work: Path
) -> Loss:
    def own(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return tuned(**batch, use_cache=False).loss

    if method.loss in ("plain", "str", "safe_lora"):
        return own
    if method.loss == "constrained_sft":
        return lambda batch: baselines.constrained_sft(tuned, batch)
    if method.loss == "full_kl":
        return lambda batch: own(batch) + method.strength * baselines.full_kl(tuned, batch)
    ids = torch.tensor(token_ids(method, tuned, tokenizer, work))
    header = _header_length(tokenizer)
    return lambda batch: own(batch) + method.strength * baselines.pact(tuned, batch, ids, header)


def _header_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens of the assistant's heading."""
    template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    asked = [{"role": "user", "content": "Hello"}]
    closed, opened = (
        tokenizer.apply_chat_template(
            asked, chat_template=template, tokenize=False, add_generation_prompt=more
        )
        for more in (False, True)
    )
    heading = opened.removeprefix(closed)
    return len(tokenizer(heading, add_special_tokens=False)["input_ids"])


def _step(
    batch: dict[str, torch.Tensor],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    history: History,
) -> None:
    began = time.perf_counter()
    value = loss(batch)
    value.backward()
    parameters = optimizer.param_groups[0]["params"]
    limit = max_grad_norm or float("inf")
    history.gradient_norm.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
    optimizer.step()
    optimizer.zero_grad()
    history.penalty.append(value.item())  # the cross-entropy is taken off in _record
    history.seconds.append(time.perf_counter() - began)


def _record(patch: Patch, history: History) -> None:
    taken = patch.meter.take()
    history.cross_entropy.append(taken.get("cross_entropy", history.penalty[-1]))
    history.penalty[-1] -= history.cross_entropy[-1]
    history.drift.append(taken.get("safety_drift", 0.0) ** 2)  # a mean square, as it always was
