"""Does a filtered head train the same model? Loss curves against those of a materialised one.

A small model is trained from random weights (a flat softmax, every weight trained), then what came
of it with LoRA on other text (a frozen head). Every head sees the same weights and
batches, so that its curve can be compared step by step; the yardstick is how far apart curves of
different seeds are, whose weights alone differ. A filter that is far too coarse must be found out.

Example: python -m benchmarks.equivalence --data prose.txt
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, finish
from str_kernels import patch_model
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench import style
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import quiet_libraries, say

HEADS: dict[str, dict[str, Any] | None] = {
    "materialised": None,
    "exact": {"filter_eps": 0.0},
    "filtered": {"filter_eps": DEFAULT_EPS, "screen": "exact", "index": None},
    "screened": {"filter_eps": DEFAULT_EPS, "screen": "bf16", "index": None},
    "fault: ε 0.3": {"filter_eps": 0.3, "screen": "exact", "index": None},
}
KINDS = {"full": "all weights, from random ones", "lora": "LoRA on what came of it"}
KEYS = ("text", "kind", "head", "seed", "steps")
VOCAB, DIM, BATCH, LENGTH = 8192, 64, 2, 32
RATES = {"full": 5e-3, "lora": 3e-3}
# Curves closer than this share of the distance between seeds are one curve; set before any run.
LIMIT = 0.1
NOTE = f"""
Distances from the materialised head's curve of the same seed, in units of those between seeds, over
all steps and over the second half; the limit of {LIMIT:.0%} is on the first. From random weights
most of the seeds' distance lies in the first steps; later they all know this easy text, and
rounding alone, grown by training, drives even the exact head's curve apart: read the others beside
it.
The filter of a trained head is used by choice only; its default is the exact pass.
"""


def main() -> None:
    """Train every kind, seed and head; what is there already is kept."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--data", type=Path, help="plain text; else a synthetic language")
    args = parse(made)
    tokens = synthetic_tokens(args.steps) if args.data is None else word_tokens(args.data)
    name = "synthetic" if args.data is None else args.data.name
    found = Results(args.out / "equivalence.jsonl", KEYS, again=args.again)
    for seed in range(args.seeds):
        measure(found, tokens, {"text": name, "seed": seed, "steps": args.steps})
    rows = [r for r in found.rows if (r["text"], r["steps"]) == (name, args.steps)]
    draw(rows, KINDS, args.out / f"equivalence-{name}.png")
    finish(args.out, "equivalence", table(rows, KINDS) + NOTE)


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options of every comparison of curves, and parse."""
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--quick", action="store_true", help="four steps, two seeds")
    args = made.parse_args()
    if args.quick:
        args.steps, args.seeds, args.out = 4, 2, args.out / "quick"
    if args.seeds < 2:
        made.error(f"--seeds {args.seeds}: must be 2 or more, whose distance is the yardstick")
    quiet_libraries()
    return args


def measure(found: Results, tokens: Tensor, where: dict[str, Any]) -> None:
    """Train every kind and head of one seed that has no row yet."""
    if all(found.has(**where, kind=kind, head=head) for kind in KINDS for head in HEADS):
        return
    full, lora = batches(tokens, where["steps"])
    model = new_model(where["seed"])
    trained = None
    for kind, text in (("full", full), ("lora", lora)):
        for head, settings in HEADS.items():
            row = {**where, "kind": kind, "head": head}
            makes_base = (kind, head) == ("full", "materialised")
            if found.has(**row) and not makes_base:
                continue
            say(f"seed {where['seed']}, {kind}, {head}")
            mine = with_lora(trained, where["seed"]) if kind == "lora" else copy.deepcopy(model)
            losses, live = train(mine, text, settings, RATES[kind])
            if makes_base:
                trained = mine
            if not found.has(**row):
                found.add(row | {"losses": [round(x, 6) for x in losses], "live": live})


def new_model(seed: int) -> nn.Module:
    """Build an untied Llama of random weights with ``VOCAB`` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=2 * DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def with_lora(model: nn.Module, seed: int) -> nn.Module:
    """Copy the model and add an adapter."""
    from str_kernels.training.lora import add_lora

    torch.manual_seed(seed)
    return add_lora(copy.deepcopy(model), rank=8)


def train(
    model: nn.Module, text: Tensor, settings: dict[str, Any] | None, rate: float
) -> tuple[list[float], float]:
    """Train on ``text [steps, B, L]``; return every loss, and the last quarter's live share.

    ``settings`` are those of ``patch_model``; None leaves the model unpatched.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    patch = None if settings is None else patch_model(model, **settings)
    losses, live = [], []
    for ids in text:
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        live.append(1.0 if patch is None else patch.last_parts.live_share.nanmean().item())
    if patch is not None:
        patch.unpatch()
    return losses, statistics.fmean(live[3 * len(live) // 4 :])


def synthetic_tokens(steps: int) -> Tensor:
    """Make two languages of ``VOCAB`` words, one after the other, with few frequent words.

    Each word has four that like to follow it, in the second language others than in the first.
    """
    g = torch.Generator().manual_seed(0)
    # This is steeper than Zipf's law, whose tail would keep every one of so few tiles live. The
    # order is mixed, since in rank order one tile would hold all frequent words.
    frequency = torch.arange(1, VOCAB + 1)[torch.randperm(VOCAB, generator=g)] ** -2.0
    count = steps * BATCH * LENGTH
    tokens = [0]
    for _ in KINDS:
        followers = torch.multinomial(frequency, 4 * VOCAB, replacement=True, generator=g)
        followers = followers.view(VOCAB, 4).tolist()
        draws = torch.multinomial(frequency, count, replacement=True, generator=g).tolist()
        for drawn, at in zip(draws, torch.rand(count, generator=g).tolist(), strict=True):
            # 0.9 of the time one of the four followers, the first of them most often
            tokens.append(followers[tokens[-1]][min(3, int(8 * at**2))] if at < 0.9 else drawn)
    return torch.tensor(tokens[1:])


def word_tokens(path: Path) -> Tensor:
    """Number a text's words by rank; those beyond the ``VOCAB`` most frequent share one number."""
    words = path.read_text(encoding="utf-8").split()
    rank = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1))}
    return torch.tensor([rank.get(word, VOCAB - 1) for word in words])


def batches(tokens: Tensor, steps: int) -> Tensor:
    """Return ``[2, steps, B, L]``: a half of the text for each kind; a short text repeats."""
    need = steps * BATCH * LENGTH
    halves = tokens[: len(tokens) // 2 * 2].view(2, -1)
    halves = halves.repeat(1, -(-need // halves.shape[1]))[:, :need]
    return halves.reshape(2, steps, BATCH, LENGTH)


def share_of_spread(curves: Tensor, truth: Tensor) -> float:
    """Return the distance of curves ``[S, steps]`` from ``truth``, relative to that between seeds.

    It is the rms over steps and seeds, divided by the rms of the seeds' standard deviation.
    """
    return ((curves - truth).square().mean().sqrt() / truth.std(0).square().mean().sqrt()).item()


def table(rows: list[dict], kinds: dict[str, str]) -> str:
    """Make a table with a line for each kind and head except the materialised one."""
    lines = []
    for kind, title in kinds.items():
        curves = curves_of(rows, kind)
        truth = curves.pop("materialised")
        late, half = 3 * truth.shape[1] // 4, truth.shape[1] // 2
        for head, mine in curves.items():
            share = share_of_spread(mine, truth)
            second = share_of_spread(mine[:, half:], truth[:, half:])
            shift = (mine - truth)[:, late:].mean().item()
            here = [row for row in rows if (row["kind"], row["head"]) == (kind, head)]
            live = statistics.fmean(row["live"] for row in here)
            numbers = [f"{share:.1%}", f"{second:.1%}", f"{shift:+.5f}", f"{live:.0%}"]
            verdict = "within" if share <= LIMIT else "beyond"
            lines.append([title, head, *numbers, f"{verdict} {LIMIT:.0%}"])
    headings = ["training", "head", "of the seeds' distance", "in the second half"]
    return markdown([*headings, "last quarter, nats", "live", "verdict"], lines)


def curves_of(rows: list[dict], kind: str) -> dict[str, Tensor]:
    """Return losses ``[S, steps]`` of each head, the materialised one included."""
    here = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["seed"])
    return {
        head: torch.tensor([row["losses"] for row in here if row["head"] == head])
        for head in dict.fromkeys(row["head"] for row in here)
    }


_COLOURS = {
    "exact": "#4db6ac",
    "filtered": style.OURS,
    "screened": "#3288bd",
    "fault: ε 0.3": style.OTHER,
}


_NAMES = {"filtered": "filtered (as by default)"}


def _band(axis: Any, curves: Tensor, colour: str, name: str) -> None:
    """Draw the mean of the seeds, and their range."""
    smooth = torch.stack([_smooth(curve) for curve in curves])
    axis.plot(smooth.mean(0), color=colour, linewidth=1.5, label=name)
    axis.fill_between(range(len(smooth[0])), *smooth.aminmax(dim=0), color=colour, alpha=0.15, lw=0)


def _smooth(curve: Tensor, width: int = 9) -> Tensor:
    padded = torch.nn.functional.pad(curve[None, None], (width // 2,) * 2, mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, width, 1)[0, 0]


def draw(rows: list[dict], kinds: dict[str, str], path: Path) -> None:
    """Draw the materialised head's curves, and the other heads' distance from them by step."""
    figure, axes = style.new_figure(2 * len(kinds), width=4.2, height=3.6)
    for at, (kind, title) in enumerate(kinds.items()):
        curves = curves_of(rows, kind)
        truth = curves.pop("materialised")
        plain, distance = axes[2 * at], axes[2 * at + 1]
        _band(plain, truth, style.STOCK, style.named("materialised"))
        default = "filtered" if "filtered" in curves else next(iter(curves))
        _band(plain, curves[default], style.OURS, _NAMES.get(default, default))
        plain.set(title=title, xlabel="step")
        style.label(plain, "y", "loss, nats", "lower")
        distance.plot(_smooth(truth.std(0)), color="black", linewidth=1.5, label="between seeds")
        for head, mine in curves.items():
            line = (mine - truth).square().mean(0).sqrt().clamp_min(1e-7)
            look = {
                "color": _COLOURS.get(head, style.colour(head)),
                "label": _NAMES.get(head, head),
            }
            look["linestyle"] = ":" if head.startswith("fault") else "-"
            distance.plot(_smooth(line), linewidth=1.2, **look)
        distance.set(yscale="log", xlabel="step")
        style.label(distance, "y", "rms distance from logits stored, nats", "lower")
    style.legend(figure, axes)
    style.save(figure, path)


if __name__ == "__main__":
    main()
