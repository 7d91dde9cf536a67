"""Teach a base model to refuse: the aligned model that every fine-tuning starts from.

Stage: base model, `Split`s → the whole body trained with frozen embeddings and head → a folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.safety.data import INSTRUCTIONS, LOOKALIKES, REFUSALS, TASKS, batches, encode
from benchmarks.safety.data import load_split as split
from str_kernels import patch_model
from str_kernels.inputs.loading import load_model_and_tokenizer

DONE = "aligned.json"


@dataclass(frozen=True)
class Recipe:
    """How the aligned model is made: from all rows, then from refusals beside their look-alikes."""

    learning_rate: float = 1e-4
    epochs: float = 2.0
    balance_rate: float = 5e-5
    balance_steps: int = 24
    batch: int = 16
    max_length: int = 80
    task_rows: int = 60
    warmup: float = 0.05
    seed: int = 0


def align(model: str, data: Path, out: Path, recipe: Recipe, say: Callable[[str], None]) -> Path:
    """Make the aligned model, unless the folder holds one made of the same.

    What was derived from another one lies in its folder, and is deleted with it.
    """
    lessons, balanced = _lessons(data, recipe), _balanced(data)
    made_of = {"model": model, "recipe": asdict(recipe), "rows": _digest([*lessons, *balanced])}
    done = out / DONE
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == made_of:
        return out
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(recipe.seed)
    base, tokenizer = load_model_and_tokenizer(model, dtype="float32")
    base.train().requires_grad_(True)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        module.requires_grad_(False)
    features = encode(tokenizer, lessons, recipe.max_length)
    steps = math.ceil(recipe.epochs * len(features) / recipe.batch)
    with patch_model(base):
        teach(
            base,
            features,
            steps=steps,
            learning_rate=recipe.learning_rate,
            recipe=recipe,
            say=say,
        )
        teach(
            base,
            encode(tokenizer, balanced, recipe.max_length),
            steps=recipe.balance_steps,
            learning_rate=recipe.balance_rate,
            recipe=recipe,
            say=say,
        )
    base.save_pretrained(out)
    tokenizer.save_pretrained(out)
    done.write_text(json.dumps(made_of), encoding="utf-8")
    return out


def fingerprint(folder: Path) -> str:
    """Return a hash of an aligned model's weights: another machine makes others of one recipe."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:8]


def teach(
    model: torch.nn.Module,
    features: list[dict],
    *,
    steps: int,
    learning_rate: float,
    recipe: Recipe,
    say: Callable[[str], None],
) -> None:
    """Train what requires a gradient, with warm-up and a linear decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    began, pad = time.perf_counter(), model.config.get_text_config().pad_token_id or 0
    queue = batches(features, size=recipe.batch, steps=steps, pad=pad, seed=recipe.seed)
    for step, batch in enumerate(queue):
        set_rate(optimizer, learning_rate, step, steps, recipe.warmup)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            spent = time.perf_counter() - began
            say(f"align {step + 1}/{steps}: loss {loss.item():.3f}, {spent:.0f} s")


def set_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: float
) -> None:
    """Set a step's learning rate: it rises over a share of the steps, and falls to 0 at the end."""
    warm = min(1.0, (step + 1) / max(1.0, warmup * steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * (1 - step / steps)


def _lessons(data: Path, recipe: Recipe) -> list[dict]:
    rows = []
    for name in (REFUSALS, INSTRUCTIONS, LOOKALIKES):
        rows += split(data, name).train
    for task in TASKS:
        rows += split(data, task).train[-recipe.task_rows :]
    return rows


def _balanced(data: Path) -> list[dict]:
    """Return as many refusals and instructions as there are look-alikes."""
    amount = len(split(data, LOOKALIKES).train)
    names = (LOOKALIKES, REFUSALS, INSTRUCTIONS)
    return [row for name in names for row in split(data, name).train[:amount]]


def _digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
