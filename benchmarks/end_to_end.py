"""Measure LoRA steps of a whole model, patched and not: tokens a second, peak memory.

Each measurement is a process of its own under a memory limit, so that one that does not fit is a
row that says so. Example: python -m benchmarks.end_to_end --model ./gemma --contexts 1024,4096
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.axes import ticks_at
from benchmarks.common import RESULTS, finish
from str_kernels.bench import style
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import quiet_libraries, say

METHODS = {
    "unpatched": "transformers' own head",
    "patched": "fused head, the patch's defaults",
    "patched-str": "fused head, 64 safety tokens, adapter-off reference",
}
KEYS = ("model", "method", "context", "dtype")
LIMIT_GIB = 20.0
QUICK_CONTEXT = 64


def main() -> None:
    """Measure every method at every context, the short ones first."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", required=True, help="local folder or Hub id")
    made.add_argument("--contexts", default="1024,2048,4096,8192,16384", help="comma-separated")
    made.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    made.add_argument("--dtype", default="float32", help="of the frozen weights")
    made.add_argument("--steps", type=int, default=2, help="measured, after one of warm-up")
    made.add_argument("--limit-gib", type=float, default=LIMIT_GIB, help="of a process's memory")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds for one process")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--quick", action="store_true", help=f"context {QUICK_CONTEXT}, one step")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.worker:
        json.dump(work(args), sys.stdout)
        return
    if args.quick:
        args.contexts, args.steps, args.out = str(QUICK_CONTEXT), 1, args.out / "quick"
    found = Results(args.out / "end_to_end.jsonl", KEYS, again=args.again)
    for context in map(int, args.contexts.split(",")):
        for method in args.methods.split(","):
            where = {"method": method, "context": context, "dtype": args.dtype}
            where["model"] = Path(args.model).name
            if not found.has(**where):
                say(f"{method}, context {context:,}")
                found.add(where | isolated(args, method, context))
    name = Path(args.model).name
    rows = [row for row in found.rows if (row["model"], row["dtype"]) == (name, args.dtype)]
    draw(rows, args.out / f"end_to_end-{name}-{args.dtype}.png")
    finish(args.out, "end_to_end", table(found.rows))


def isolated(args: argparse.Namespace, method: str, context: int) -> dict[str, Any]:
    """Run the worker; return its row, or the reason why there is none."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--worker", method]
    for name in ("model", "dtype", "steps", "limit_gib"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--contexts", str(context)]
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=args.timeout
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"did not finish within {args.timeout:.0f} s"}
        errors.seek(0)
        said = errors.read()
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode < 0 or "allocate memory" in said or "MemoryError" in said:
        return {"reason": f"does not fit into {args.limit_gib:g} GiB"}
    raise RuntimeError(f"{' '.join(command)} failed:\n{said}")


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Load, patch, and train some steps on Python's manual, in a process of its own."""
    import resource

    limit = int(args.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # what it allocates, libraries apart

    import torch

    from str_kernels import SafetyConstraint, patch_model
    from str_kernels.inputs.loading import load_model_and_tokenizer
    from str_kernels.training.lora import add_lora

    quiet_libraries()
    context = int(args.contexts)
    model, tokenizer = load_model_and_tokenizer(args.model, dtype=args.dtype, device="cpu")
    model = add_lora(model, rank=16).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    if args.worker != "unpatched":
        vocab = model.get_output_embeddings().weight.shape[0]
        ids = [i * vocab // 64 for i in range(64)]
        safety = SafetyConstraint(ids) if args.worker == "patched-str" else None
        patch_model(model, safety)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = prose_ids(tokenizer, context * (args.steps + 1))
    seconds, losses = [], []
    for batch in torch.tensor(ids).view(args.steps + 1, 1, context):
        started = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    rate = context * args.steps / sum(seconds[1:])  # the first step compiles, builds an index
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_s": rate, "peak_bytes": peak, "seconds": seconds, "losses": losses}


def prose_ids(tokenizer: Any, count: int) -> list[int]:
    """Return the first ``count`` tokens of Python's manual, repeated if it is too short."""
    from str_kernels.bench.reading import prose

    ids, texts = [], itertools.cycle(prose(None))
    while len(ids) < count:
        ids += tokenizer(next(texts))["input_ids"]
    return ids[:count]


def table(rows: list[dict]) -> str:
    """Make a table with a line for each process."""
    lines = []
    for row in rows:
        line = [row["model"], f"{row['context']:,}", row["method"], row["dtype"]]
        if "reason" in row:
            lines.append([*line, row["reason"], ""])
        else:
            rate, peak = f"{row['tokens_per_s']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}"
            lines.append([*line, rate, peak])
    headings = ["model", "context", "method", "dtype", "tokens/s", "peak GiB of the process"]
    return markdown(headings, lines)


def _mark_absent(axis: Any, rows: list[dict]) -> None:
    """Mark at the limit of memory what did not fit."""
    for row in rows:
        place, look = (row["context"], LIMIT_GIB), {"color": style.colour(row["method"])}
        axis.plot(*place, marker="x", markersize=10, markeredgewidth=2.5, **look)
        axis.annotate(
            f"out of\n{LIMIT_GIB:.0f} GiB", place, xytext=(-8, -2), textcoords="offset points",
            ha="right", va="center", fontsize=9, **look,
        )  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    """Draw tokens a second and peak memory by context."""
    figure, axes = style.new_figure(2, width=5.0)
    for method in METHODS:
        line = [r for r in rows if r["method"] == method and "peak_bytes" in r]
        line.sort(key=lambda r: r["context"])
        xs = [r["context"] for r in line]
        look = {"marker": "o", "color": style.colour(method), "label": style.named(method)}
        axes[0].plot(xs, [r["tokens_per_s"] for r in line], **look)
        axes[1].plot(xs, [r["peak_bytes"] / 2**30 for r in line], **look)
        _mark_absent(axes[1], [r for r in rows if r["method"] == method and "reason" in r])
    labels = (("tokens a second", "higher"), ("peak memory of the process, GiB", "lower"))
    for axis, (label, better) in zip(axes, labels, strict=True):
        ticks_at(axis, [row["context"] for row in rows])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
        style.label(axis, "y", label, better)
    style.legend(figure, axes[:1])
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}: LoRA steps", fontsize=11)
    style.save(figure, path)


if __name__ == "__main__":
    main()
