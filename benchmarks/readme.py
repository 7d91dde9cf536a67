"""Write the README's measured tables from the committed results.

Example: python -m benchmarks.readme
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.architectures.table import FILE as ARCHITECTURES
from benchmarks.architectures.table import SCHEMA as SWEEP
from benchmarks.common import RESULTS
from benchmarks.judge import NEVER_READ
from benchmarks.safety.findings import Group, read
from benchmarks.safety.methods import HARSH, HARSHEST, plan_order
from str_kernels.bench.report import SCHEMA, Row, milliseconds, read_rows
from str_kernels.evaluation.rates import Rate

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: python -m benchmarks.readme -->", "<!-- /measured -->"
HEADS = {
    "ours": "**str_kernels**",
    "ours-str": "**with STR, K = 64**",
    "compiled": "transformers, compiled",
    "liger": "Liger",
    "cce": "CCE",
    "transformers": "transformers, logits stored",
}
HELD = {
    "plain": "nothing (plain)",
    "kl": "**`kl` at 10, the default**",
    "kl-anchors": "the same with anchors",
}
# folder of results, dtype, D: the two machines of the table
GPU, CPU = ("h200", "bfloat16", 4096), (".", "float32", 640)


def main() -> None:
    """Replace what stands between the markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{section()}\n{END}{after}", encoding="utf-8")


def section() -> str:
    """Make the tables from ``benchmarks/results``."""
    return "\n\n".join([_head(), _safety()])


def _read(name: str) -> tuple[Row, list[Row]]:
    return read_rows(RESULTS / f"{name}.jsonl", SCHEMA)


def _timed(folder: str, dtype: str, dim: int) -> dict[str, Row]:
    """Return the rows of the largest N with a frozen head, by contender.

    They are those of `benchmarks.gpu` where it ran, else of `benchmarks.head`.
    """
    name = "gpu" if (RESULTS / folder / "gpu.jsonl").exists() else "head"
    rows = [row for row in _read(f"{folder}/{name}")[1] if "contender" in row and "gemms" in row]
    wanted = {"dtype": dtype, "D": dim, "trainable": False}
    rows = [row for row in rows if wanted.items() <= {"trainable": False, **row}.items()]
    most = max((row["N"] for row in rows), default=0)
    return {row["contender"]: row for row in rows if row["N"] == most}


def _head() -> str:
    found = [_timed(*GPU), _timed(*CPU)]
    lines = [
        "| loss head, forward and backward | H200, bf16: ms | GiB¹ | 2 CPU cores, fp32: ms | GiB |",
        "|---|---|---|---|---|",
    ]
    for name, label in HEADS.items():
        cells = [cell for rows in found for cell in _costs(rows.get(name))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _footnote(*found)])


def _costs(row: Row | None) -> list[str]:
    if row is None:
        return ["–", "–"]  # needs a GPU, or was not run
    gib = row["peak_bytes"] / 2**30
    return [milliseconds(row["seconds"]), f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"]


def _footnote(*found: dict[str, Row]) -> str:
    shapes = []
    for rows in found:
        shape = next(iter(rows.values()))
        times = ", ".join(f"{rows[name]['gemms']:.2f}" for name in HEADS if name in rows)
        product = statistics.median(s / r for s, r in zip(*_paired(rows["ours"]), strict=True))
        shapes.append(
            f"N {shape['N']:,}, V {shape['V']:,}, D {shape['D']:,}: {times} × the bare product "
            f"({1e3 * product:,.0f} ms)"
        )
    return (
        f"¹ Peak extra memory; frozen head. {'; '.join(shapes)}, which is hidden states times "
        "head in the same dtype as torch makes it. The CPU's are a trained model's states, the "
        "GPU's are synthetic and as uncertain. [Errors, exact path, other heads]"
        f"(docs/benchmarks.md): the default's gradient errs by {_error('float32', 'ours')} (fp32), "
        f"that of stored bf16 logits by {_error('bfloat16', 'transformers')}."
    )


def _error(dtype: str, name: str) -> str:
    return f"{_timed('.', dtype, 640)[name]['hidden_error']:.1%}"


def _paired(row: Row) -> tuple[list[float], list[float]]:
    return row["seconds"], row["ratios"]


def _safety() -> str:
    findings = read(RESULTS / "safety", plan_order())
    aligned = Group("", "", (findings.aligned[HARSH.task, ""],))
    lines = [
        f"| Gemma 3 270M, LoRA on SST-2; held by | at {HARSH.learning_rate:g}: refuses, "
        f"over-refuses, accuracy | at {HARSHEST.learning_rate:g} | runs |",
        "|---|---|---|---|",
        f"| aligned, not tuned | {', '.join(_rates(aligned))} | | |",
    ]
    for method, label in HELD.items():
        groups = [findings.find(setting.name, method) for setting in (HARSH, HARSHEST)]
        cells = " | ".join(", ".join(_rates(group)) for group in groups)
        lines.append(f"| {label} | {cells} | {' and '.join(str(g.runs) for g in groups)} |")
    return "\n".join([*lines, "", _judge()])


def _judge() -> str:
    (row,) = (row for row in _read("judge")[1] if row["part"] == NEVER_READ)
    rate = Rate(row["agreed"], row["n"])
    low, high = (f"{100 * bound:.0f}" for bound in rate.interval)
    return (
        "Refusals are judged by rules, which agree with human annotators on "
        f"{100 * rate.value:.1f} % of {rate.total} answers not read before ({low} to {high} %). "
        f"{_architectures()} [Everything that was run](benchmarks/results/safety/REPORT.md)."
    )


def _rates(group: Group) -> list[str]:
    """Return the shares refused, look-alikes refused, and right."""
    rates = group.rate("harmful", "refusal"), group.rate("benign", "refusal"), group.rate("task")
    return [f"{100 * rate.value:.0f} %" for rate in rates]


def _architectures() -> str:
    rows = read_rows(RESULTS / ARCHITECTURES, SWEEP)[1]
    tasks = {
        name: [row for row in rows if row["task"].startswith(start)]
        for start, name in (("causal", "causal language models"), ("image", "image-text models"))
    }
    counts = " and ".join(
        f"{sum(row['outcome'] == 'fused' for row in of)} of {len(of)} {name}"
        for name, of in tasks.items()
    )
    return (
        f"[{counts} of transformers](benchmarks/results/architectures.md) fuse, with the losses, "
        "gradients and tokens that they had; none is wrong."
    )


if __name__ == "__main__":
    main()
