"""Write the README's measured tables from the committed results.

Example: python -m benchmarks.readme
"""

from __future__ import annotations

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
NAMES = {
    "ours": "**str_kernels**",
    "ours-str": "**with STR (`mse`), K = 64**",
    "ours-exact": "exact (`filter_eps=0`)",
    "transformers": "transformers, logits stored",
    "compiled": "the same, compiled",
    "torch": "`F.linear_cross_entropy`",
    "cce": "CCE (`torch_compile`)",
    "trl": "TRL's fused head",
    "liger": "Liger",
}

ON_GPU = {
    "ours": "**str_kernels**",
    "ours-str": "with STR",
    "ours-exact": "exact",
    "transformers": "transformers",
    "compiled": "the same compiled",
    "cce": "CCE",
    "trl": "TRL",
    "liger": "Liger",
    "liger-hopper": "Liger's CuTe head",
    "liger-scaled": "Liger's other one",
    "quack": "quack",
}
HELD = {
    "plain": "nothing (plain)",
    "kl": "**`kl`, 10, the default**",
    "kl-anchors": "the same with anchors",
    "kl-random-tokens": "the same with 64 random tokens",
    "kl-weak": "`kl`, 1",
    "mse": "`mse`, 0.1",
    "logprob": "`logprob`, 0.1",
    "pact": "PACT's gated KL, 1",
}
OUTCOMES = {
    "falls back": "its logits are stored, for they are not one head's product or are written into",
    "refused": "no output head",
    "not built": "no tiny configuration, or a package is missing",
    "not run": "unpatched it fails on text alone",
}


def main() -> None:
    """Replace what stands between the markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{section()}\n{END}{after}", encoding="utf-8")


def section() -> str:
    """Make the tables from ``benchmarks/results``."""
    return "\n\n".join([_safety(), _head(), f"{_gpu()} {_counted()}", _architectures()])


def _read(name: str) -> tuple[Row, list[Row]]:
    return read_rows(RESULTS / f"{name}.jsonl", SCHEMA)


def _safety() -> str:
    findings = read(RESULTS / "safety", plan_order())
    main, hardest = HARSH.name, HARSHEST.name
    aligned = Group("", "", (findings.aligned[HARSH.task, ""],))
    lines = [
        "Gemma 3 270M, aligned for the purpose, then LoRA on SST-2 (rank 8, learning rate "
        f"{HARSH.learning_rate:g}, {HARSH.steps} steps of {HARSH.batch}, fp32): what it answers "
        f"afterwards, and at a learning rate of {HARSHEST.learning_rate:g}. "
        "Every position is held unless said otherwise. "
        f"{_judge()} "
        "[Everything that was run, and what we take from it](benchmarks/results/safety/REPORT.md).",
        "",
        "| held by | seeds | harmful requests refused | benign look-alikes refused | accuracy "
        f"| at {HARSHEST.learning_rate:g}: the same three |",
        "|---|---|---|---|---|---|",
        f"| aligned, not tuned | | {' | '.join(_rates(aligned))} | |",
    ]
    for method, label in HELD.items():
        group, harder = findings.find(main, method), findings.find(hardest, method)
        if group is None:
            continue
        last = "" if harder is None else ", ".join(_rates(harder))
        if harder is not None and harder.seeds != group.seeds:
            last += f" (seeds: {harder.seeds})"
        lines.append(f"| {label} | {group.seeds} | {' | '.join(_rates(group))} | {last} |")
    return "\n".join(lines)


def _judge() -> str:
    (row,) = (row for row in _read("judge")[1] if row["part"] == NEVER_READ)
    rate = Rate(row["agreed"], row["n"])
    low, high = (f"{100 * bound:.0f}" for bound in rate.interval)
    return (
        "Refusals are judged by rules; they agree with human annotators on "
        f"{100 * rate.value:.1f} % of {rate.total} answers not read while they were written "
        f"({low} to {high} %)."
    )


def _rates(group: Group) -> list[str]:
    """Return the shares refused, look-alikes refused, and right."""
    rates = group.rate("harmful", "refusal"), group.rate("benign", "refusal"), group.rate("task")
    return [f"{100 * rate.value:.0f} %" for rate in rates]


def _head() -> str:
    head, rows = _read("head")
    where = head["circumstances"]
    timed = [row for row in rows if row["contender"] != "inputs" and not row["trainable"]]
    shape = next(row for row in timed if row.get("gemms"))
    first = (
        f"The loss head, forward and backward, frozen: N {shape['N']:,}, V {shape['V']:,}, D "
        f"{shape['D']}, real hidden states ({shape['case']}), {where['threads']} threads of an "
        f"{where['processor']} with {where['cpu_capability']}, torch {where['versions']['torch']}. "
        "Time in GEMMs: 1 is the bare product of hidden states and head in the same dtype, as "
        "torch makes it; here one in fp32 by oneDNN takes half as long and one in int8 a tenth, "
        "and ours uses both (with AMX bf16 in place of int8: not measured). No figure: not run "
        "here, or none to give; Liger does not run without a GPU "
        "([why](benchmarks/results/head.md))."
    )
    lines = [
        "| head | fp32 | bf16 | extra memory, fp32 | gradient error, fp32 | bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in NAMES.items():
        by_dtype = {row["dtype"]: row for row in timed if row["contender"] == name}
        if any(row.get("gemms") for row in by_dtype.values()):
            lines.append(_head_row(label, by_dtype.get("float32"), by_dtype.get("bfloat16")))
    return "\n".join([first, "", *lines])


def _head_row(label: str, full: dict | None, half: dict | None) -> str:
    cells = [_cell(full, "gemms", "{:.2f}"), _cell(half, "gemms", "{:.2f}")]
    peak = (
        "" if not full or not full.get("peak_bytes") else f"{full['peak_bytes'] / 2**20:,.0f} MiB"
    )
    errors = [_cell(row, "hidden_error", "{:.2%}") for row in (full, half)]
    return "| " + " | ".join([label, *cells, peak, *errors]) + " |"


def _cell(row: dict | None, name: str, form: str) -> str:
    if row is None:
        return ""
    return form.format(row[name]) if row.get(name) is not None else "–"


def _gpu() -> str:
    """Tell every GPU's figures: of `benchmarks.gpu` where it ran, else of `benchmarks.head`."""
    return " ".join(_one_gpu(folder) for folder in sorted(_folders()))


def _folders() -> set[Path]:
    return {path.parent for name in ("gpu", "head") for path in RESULTS.glob(f"*/{name}.jsonl")}


def _one_gpu(folder: Path) -> str:
    name = "gpu" if (folder / "gpu.jsonl").exists() else "head"
    head, rows = _read(f"{folder.name}/{name}")
    rows = [row for row in rows if row.get("contender") in ON_GPU and row.get("gemms")]
    most = max(row["N"] for row in rows)
    shapes: dict[str, list[str]] = {}
    for row in (row for row in rows if row["N"] == most):
        shape = f"N {row['N']:,}, V {row['V']:,}, D {row['D']:,}"
        time = f"{milliseconds(row['seconds'])} ({row['gemms']:.2f})"
        cells = f"{time} and {row['peak_bytes'] / 2**20:,.0f}"
        shapes.setdefault(shape, []).append(f"{ON_GPU[row['contender']]} {cells}")
    lists = "; ".join(f"{shape}: {', '.join(found)}" for shape, found in shapes.items())
    notes = "NOTES" if (folder / "NOTES.md").exists() else "gpu"
    return (
        f"On one {head['circumstances']['device']}, bf16, synthetic states as uncertain as a "
        "trained model's, each call on an idle device: ms (in bare products timed beside it) and "
        f"MiB of extra memory: {lists}. [Errors, stages, few rows, LoRA steps]"
        f"(benchmarks/results/{folder.name}/{notes}.md)."
    )


def _counted() -> str:
    rows = [row for row in _read("counted")[1] if row["rows"] == 2048]
    found = {}
    for head, screen in (("frozen", "exact"), ("frozen", "int8"), ("trainable", "exact")):
        values = [r["gemms"] for r in rows if r["head"] == head and r["screen"] == screen]
        found[head, screen] = f"{min(values):.2f} to {max(values):.2f}"
    return (
        "Counted and not timed (operations that the kernels issue, padding included; "
        f"{len({row['case'] for row in rows})} real sets, N 2,048, 16-bit operands): "
        f"{found['frozen', 'exact']} GEMMs with a frozen head, {found['frozen', 'int8']} with an "
        f"8-bit screen, {found['trainable', 'exact']} with a trainable head. Stored logits take 2 "
        "and 3. [Where they go](benchmarks/results/counted.md)."
    )


def _architectures() -> str:
    rows = read_rows(RESULTS / ARCHITECTURES, SWEEP)[1]
    tasks = {
        name: [row for row in rows if row["task"].startswith(start)]
        for start, name in (("causal", "causal language models"), ("image", "image-text models"))
    }
    counts = " and ".join(
        f"{sum(row['outcome'] == 'fused' for row in of)} of transformers' {len(of)} {name}"
        for name, of in tasks.items()
    )
    others = []
    for outcome, why in OUTCOMES.items():
        names = dict.fromkeys(row["model_type"] for row in rows if row["outcome"] == outcome)
        others.append(f"{outcome} ({why}): {', '.join(names)}")
    return (
        f"Patched against unpatched: {counts} fuse, with equal losses, gradients, logits and "
        f"generated tokens; none is wrong. The others: {'; '.join(others)}. "
        "[Each with its reason](benchmarks/results/architectures.md)."
    )


if __name__ == "__main__":
    main()
