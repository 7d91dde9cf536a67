"""Thousands of steps of ``train`` with lengths that vary: are memory and time a step flat?

Resident memory is read after every step, and its median over a stretch of steps is compared with
that of the first stretch after a beginning in which allocators fill. The model is random and of a
size whose steps are short; ``--model`` and ``--data`` take others.

Example: python -m benchmarks.soak --steps 3000
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import RESULTS, finish
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import quiet_libraries, say
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.callbacks import NoProgress
from str_kernels.training.checks import prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings

WORDS, LENGTH, PARTS = 16000, 256, 10
NOTE = """
Resident memory and time a step, medians of tenths of the run. The first tenth has the clustering of
the vocabulary and first allocations of every length.
"""


class Resident(NoProgress):
    """Keeps the resident bytes of this process, and the time, after every step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.times: list[float] = []

    def step(self, done: int, total: int) -> None:
        """Read both once an optimizer step is done."""
        if done:
            self.bytes.append(resident_bytes())
            self.times.append(time.perf_counter())


def resident_bytes() -> int:
    """Return the resident size of this process."""
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    """Train with and without the constraint, and without the patch."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--steps", type=int, default=3000)
    made.add_argument("--methods", default="str,unpatched", help="comma-separated")
    made.add_argument("--width", type=int, default=256, help="hidden size of the random model")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    args = made.parse_args()
    quiet_libraries()
    found = Results(
        args.out / "soak.jsonl", ("method", "steps", "width", "layers"), again=args.again
    )
    for method in args.methods.split(","):
        where = {"method": method, "steps": args.steps, "width": args.width, "layers": args.layers}
        if not found.has(**where):
            say(f"soak: {where}")
            found.add(where | soak(method, args.steps, args.width, args.layers))
    finish(args.out, "soak", table(found.rows) + NOTE)


def soak(method: str, steps: int, width: int, layers: int) -> dict[str, list[float]]:
    """Train one run; return MiB and seconds of a step, by tenths of it."""
    seen = Resident()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_inputs(folder, steps, width, layers)
        settings = TrainSettings(
            model=str(folder / "model"), data=str(folder / "data.jsonl"), out=str(folder / "out"),
            method=method, steps=steps, batch=1, rank=8, max_length=LENGTH, save_steps=steps // 4,
            tokens=tokens if method == "str" else None, logging_steps=10,
        )  # fmt: skip
        train(prepare(settings), seen)
    part = max(1, len(seen.bytes) // PARTS)
    seconds = [after - before for before, after in zip(seen.times, seen.times[1:], strict=False)]
    return {
        "mib": [round(m / 2**20, 1) for m in medians(seen.bytes, part)],
        "seconds": [round(s, 4) for s in medians(seconds, part)],
    }


def medians(values: list[float], part: int) -> list[float]:
    """Return the medians of consecutive parts."""
    parts = [values[i : i + part] for i in range(0, len(values), part)]
    return [statistics.median(p) for p in parts[:PARTS]]


def write_inputs(folder: Path, steps: int, width: int, layers: int) -> str:
    """Write a random model, its tokenizer of made-up words, data, and safety tokens."""
    source = random.Random(0)
    words = [f"w{i}" for i in range(WORDS)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", *words])}
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    rows = [row(source, words) for _ in range(steps)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text)
    path = folder / "tokens.json"
    SafetyTokens.from_strings(tokenizer, words[:64]).save(path)
    return str(path)


def row(source: random.Random, words: list[str]) -> dict[str, Any]:
    """Make a conversation of 4 to about 240 words, each length as likely."""
    length = source.randint(4, LENGTH - 16)
    asked = source.randint(1, length - 1)
    text = [source.choice(words) for _ in range(length)]
    return {"prompt": " ".join(text[:asked]), "response": " ".join(text[asked:])}


def table(rows: list[dict[str, Any]]) -> str:
    """Draw memory and time by tenths."""
    head = ["run", "", *(f"{i + 1}/{PARTS}" for i in range(PARTS))]
    lines = []
    for found in rows:
        name = f"{found['method']}, {found['steps']} steps, width {found['width']}"
        lines.append([name, "MiB", *(f"{m:.0f}" for m in found["mib"])])
        lines.append(["", "ms", *(f"{1000 * s:.0f}" for s in found["seconds"])])
    return markdown(head, lines)


if __name__ == "__main__":
    main()
