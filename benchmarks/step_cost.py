"""Measure what the constraint adds to a whole training step, in turns with a step without one.

Both models are LoRA on the same weights, on the same batches of real rows; the unit is the step
with the fused head and without a constraint. The reference of ``cached`` is there already, as in
every epoch but the first.

Example: python -m benchmarks.step_cost --model ./gemma --data answers.jsonl
"""

from __future__ import annotations

import argparse
import random
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, finish
from str_kernels import SafetyConstraint, patch_model
from str_kernels.bench.clock import paired
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import quiet_libraries, say
from str_kernels.huggingface.constraint.anchors import join_anchors
from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.inputs.chat import collate, encode_conversation
from str_kernels.inputs.data import encode_file, read_numbered
from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.safety.templates import BENIGN_REQUESTS, REFUSED_REQUESTS, REJECTION_TEMPLATES
from str_kernels.training.lora import add_lora

TOKENS = 64
KEYS = ("model", "data", "dtype", "batch", "max_length", "variant")


@dataclass(frozen=True)
class Variant:
    """One way to constrain; without a kind there is no constraint."""

    name: str
    kind: str | None = None
    reference: str = "adapter_off"
    share: float = 1.0
    patched: bool = True
    alone: int = 0  # so many pairs of anchors join each batch, and nothing else is constrained


VARIANTS = (
    Variant("transformers' own head, no constraint", patched=False),
    *(
        Variant(f"{kind}, {name}", kind, reference, share)
        for kind in ("kl", "kl_mass")
        for name, reference, share in (
            ("adapter off", "adapter_off", 1.0),
            ("adapter off, share 0.25", "adapter_off", 0.25),
            ("cached", "cache", 1.0),
        )
    ),
    *(
        Variant(f"{kind}, adapter off, four anchors alone", kind, alone=2)
        for kind in ("kl", "kl_mass")
    ),
)


def main() -> None:
    """Measure every variant in turns with the unit."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", required=True, help="local folder or Hub id")
    made.add_argument("--data", required=True, help=".jsonl of conversations")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--device", default="cpu")
    made.add_argument("--batch", type=int, default=8, help="rows of a step")
    made.add_argument("--max-length", type=int, default=128, help="tokens of a row at most")
    made.add_argument("--steps", type=int, default=4, help="batches that each repeat trains on")
    made.add_argument("--repeats", type=int, default=5, help="paired runs at most")
    made.add_argument("--budget", type=float, default=180.0, help="seconds of a variant at most")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder; what it holds is kept")
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    args = made.parse_args()
    quiet_libraries()
    found = Results(args.out / "step_cost.jsonl", KEYS, again=args.again)
    where = {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        **{name: getattr(args, name) for name in ("dtype", "batch", "max_length")},
    }
    missing = [v for v in VARIANTS if not found.has(**where, variant=v.name)]
    if missing:
        bench = _Bench(args)
        for variant in missing:
            say(variant.name)
            found.add(where | bench.cost(variant))
    finish(args.out, "step_cost", table(found.rows))


class _Bench:
    """Two models of the same weights, and the batches that both are trained on."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.plain, self.tokenizer = self._trainer()
        numbered = read_numbered(args.data)
        data = encode_file(
            args.data, numbered, self.tokenizer, max_length=args.max_length, long="skip"
        ).features()
        chosen = random.Random(0).sample(data, min(args.batch * args.steps, len(data)))
        chosen.sort(key=lambda row: len(row["input_ids"]))
        parts = [chosen[i : i + args.batch] for i in range(0, len(chosen), args.batch)]
        self.batches = [
            {k: v.to(args.device) for k, v in collate(part, pad_token_id=0).items()}
            for part in parts
        ]
        patch_model(self.plain.model)

    def _trainer(self) -> tuple[_Trainer, Any]:
        args = self.args
        model, tokenizer = load_model_and_tokenizer(
            args.model, dtype=args.dtype, device=args.device
        )
        return _Trainer(add_lora(model, rank=8).train()), tokenizer

    def cost(self, variant: Variant) -> dict[str, Any]:
        """Return the paired times of one variant."""
        constrained, _ = self._trainer()
        with tempfile.TemporaryDirectory() as folder:
            if variant.patched:
                vocab = constrained.model.get_output_embeddings().weight.shape[0]
                ids = [i * vocab // TOKENS for i in range(TOKENS)]
                safety = SafetyConstraint(ids, kind=variant.kind)
                reference: Any = variant.reference
                if reference == "cache":  # the warm-up fills it
                    reference = FillingCache(Path(folder, "references.sqlite"), safety)
                patch_model(constrained.model, safety, reference=reference, share=variant.share)
            batches = [self._anchored(batch, variant.alone) for batch in self.batches]
            timing = paired(
                constrained.steps(batches),
                self.plain.steps(self.batches),
                device=torch.device(self.args.device),
                repeats=self.args.repeats,
                budget_s=self.args.budget,
                queued=False,
            )
        tokens = sum(int(b["attention_mask"].sum()) for b in self.batches)
        learned = sum(int((b["labels"] >= 0).sum()) for b in self.batches)
        counts = {"steps": len(self.batches), "tokens": tokens, "labelled": learned}
        times = {"seconds": timing.seconds, "unit_seconds": timing.units, "ratios": timing.ratios}
        return {"variant": variant.name, **counts, "ratio": timing.ratio, **times}

    def _anchored(self, batch: dict[str, torch.Tensor], pairs: int) -> dict[str, torch.Tensor]:
        """Join pairs of a refused and a benign request, with answers of a rejection's length."""
        if not pairs:
            return batch
        chosen = [r for pair in zip(REFUSED_REQUESTS, BENIGN_REQUESTS, strict=True) for r in pair]
        rows = [
            encode_conversation(
                self.tokenizer,
                [
                    {"role": "user", "content": request},
                    {"role": "assistant", "content": REJECTION_TEMPLATES[0]},
                ],
                max_length=self.args.max_length,
            )
            for request in chosen[: 2 * pairs]
        ]
        features = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
        anchors = {k: v.to(self.args.device) for k, v in collate(features, pad_token_id=0).items()}
        return join_anchors(batch, anchors, "all", 0, share=1.0, alone=True)


class _Trainer:
    """A model with its optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def steps(self, batches: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
        """Make a call that trains a step on each batch."""

        def call() -> None:
            for batch in batches:
                self.model(**batch, use_cache=False).loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

        return call


def table(rows: list[dict]) -> str:
    """Make a table with a line for each variant."""
    lines = [
        [
            f"{row['model']}, {row['data']}",
            f"{row['batch']} × {row['max_length']}, {row['dtype']}",
            row["variant"],
            f"{row['ratio'] - 1:+.0%}",
            f"{min(row['ratios']) - 1:+.0%} to {max(row['ratios']) - 1:+.0%}",
        ]
        for row in rows
    ]
    return markdown(["model, rows", "batch", "step", "beside no constraint", "repeats"], lines)


if __name__ == "__main__":
    main()
