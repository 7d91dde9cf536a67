"""Does the filter train the same adapter? LoRA on a real model, its vocabulary indexed by default.

The small models of ``benchmarks.equivalence`` have few tiles, and most stay live; in a real
vocabulary a few in a hundred do. The measure is the same: curves step by step, in units of the
distance between seeds, which here differ in the adapter's first weights alone.

Example: python -m benchmarks.equivalence_model --model ./gemma --data answers.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import finish
from benchmarks.equivalence import HEADS, KEYS, LIMIT, draw, parse, table, train
from str_kernels.bench.report import Results
from str_kernels.cli.console import say
from str_kernels.inputs.data import encode_file, read_numbered
from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.training.lora import add_lora
from str_kernels.training.settings import TrainSettings

RATE, RANK = 1e-3, 8
LENGTH = 128  # tokens of a batch of one
NOTE = f"""
Distances from the materialised head's curve of the same seed, in units of those between seeds,
whose adapters start elsewhere, over all steps and over the second half; the limit of {LIMIT:.0%} is
on the first. LoRA of rank {RANK}, learning rate {RATE:g}, {LENGTH} tokens a step, all predicted.
The exact head's line is what rounding alone does: where it is beyond the limit too, the seeds are
no farther apart than rounding drives them, and the filter's line is to be read beside that one.
"""


def main() -> None:
    """Train every seed and head; what is there already is kept."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", required=True, help="local folder or Hub id")
    made.add_argument("--data", type=Path, required=True, help=".jsonl of conversations")
    made.add_argument("--heads", default=",".join(HEADS), help="comma-separated")
    args = parse(made)
    heads = args.heads.split(",")
    if "materialised" not in heads or not set(heads) <= set(HEADS):
        made.error(f"--heads {args.heads}: must be materialised and others of {', '.join(HEADS)}")
    name = f"{Path(args.model).name}-{args.data.stem}"
    found = Results(args.out / f"equivalence-{name}.jsonl", KEYS, again=args.again)
    where = {"text": args.data.name, "kind": "model", "steps": args.steps}
    measure(found, args, where)
    rows = [row for row in found.rows if row["steps"] == args.steps]
    kinds = {"model": f"LoRA on {Path(args.model).name}, {args.data.stem}"}
    draw(rows, kinds, args.out / f"equivalence-{name}.png")
    finish(args.out, f"equivalence-{name}", table(rows, kinds) + NOTE)


def measure(found: Results, args: argparse.Namespace, where: dict[str, Any]) -> None:
    """Train every head of every seed on the same batches."""
    todo = [
        (seed, head)
        for seed in range(args.seeds)
        for head in args.heads.split(",")
        if not found.has(**where, seed=seed, head=head)
    ]
    if not todo:
        return
    model, tokenizer = load_model_and_tokenizer(args.model, dtype="float32", device="cpu")
    text = packed(args.data, tokenizer, args.steps)
    settings = TrainSettings(model=args.model, data=str(args.data), out="-", rank=RANK)
    for seed, head in todo:
        say(f"seed {seed}, {head}")
        torch.manual_seed(seed)
        adapted = add_lora(model, **settings.lora)
        losses, live = train(adapted, text, indexed(head), RATE)
        model = adapted.unload()
        row = {**where, "seed": seed, "head": head}
        found.add(row | {"losses": [round(x, 6) for x in losses], "live": live})


def indexed(head: str) -> dict[str, Any] | None:
    """Return the head's settings with the index that the patch makes by itself."""
    settings = HEADS[head]
    return None if settings is None else {**settings, "index": "auto"}


def packed(data: Path, tokenizer: Any, steps: int) -> Tensor:
    """Join conversations end to end into ``[steps, 1, LENGTH]``; a short file repeats."""
    sequences = encode_file(data, read_numbered(data), tokenizer, max_length=4096).sequences
    ids = [token for sequence in sequences for token in sequence.input_ids]
    need = steps * LENGTH
    return torch.tensor(ids * -(-need // len(ids)))[:need].view(steps, 1, LENGTH)


if __name__ == "__main__":
    main()
