"""Make ``REPORT.md``, a page, and its appendix from the results alone.

Every sentence that states a result is made from numbers, or stands in ``conclusions.md``; what is
fixed text says how it was measured and where its limits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.safety.appendix import appendix
from benchmarks.safety.cells import by_seed, p_value, shares
from benchmarks.safety.findings import Findings, Group, paired, read
from benchmarks.safety.methods import COMPARED, HARSH, HARSHEST, OBEYING, plan_order
from benchmarks.safety.plots import balance
from str_kernels.bench.report import markdown
from str_kernels.bench.style import DEFAULT

SHORT = ("plain", DEFAULT, f"{DEFAULT}-anchors")
CONTESTED = (HARSH.name, HARSHEST.name, OBEYING.name)  # where methods differ
BALANCE = "balance.png"

HOW = """\
A base model is aligned (its whole body trained to refuse harmful requests and to answer benign
ones), then fine-tuned with LoRA on a benign task while its safety tokens are held in different
ways, and asked again: held-out harmful requests, benign requests that look harmful, held-out task
rows, and reference answers to held-out instructions (neutral text). Answers are greedy. `plain` is
the same fine-tuning with nothing held. No request that is asked was ever trained on. Intervals are
95 % (Wilson, over rows and runs); p is the exact McNemar test against `plain` on the same prompts
and seeds. Both count the same prompts once a run and know nothing of how far runs differ: look at
each. A run is a seed of an aligned model, of which there are several. Seconds and memory were taken
with other work on the machine: compare them loosely."""

CONCLUSIONS = "conclusions.md"  # beside the results, written by who has read them

LIMITS = """\
- One small base model, English requests only, one aligning recipe.
- Refusals are judged by rules that read an answer's words; the judge cannot see harm.
- A few tokens of answer are read: enough to see a refusal, not what would follow.
- Refusing is not all of safety: nothing here says what a model that no longer refuses would do,
  nor how it stands up to an attacker.
- A missing row was not run; nothing that was run was left out of [the appendix](APPENDIX.md)."""


def write(folder: Path) -> Path:
    """Write the report and its appendix beside the results; return the report's path.

    Raises:
        ValueError: the folder holds no results, or strange ones.
    """
    findings = read(folder, plan_order())
    conclusions = folder / CONCLUSIONS
    concluded = conclusions.read_text(encoding="utf-8").strip() if conclusions.is_file() else ""
    parts = ["# Does it keep a model safe?", HOW, _made(findings), _short(findings), concluded]
    parts += [compared(findings, folder), "## Limits", LIMITS]
    path = folder / "REPORT.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    (folder / "APPENDIX.md").write_text(appendix(findings, folder), encoding="utf-8")
    return path


def compared(findings: Findings, folder: Path) -> str:
    """Return the methods side by side where they differ; the picture is drawn into the folder."""
    contested = [s for s in CONTESTED if findings.of(s)]
    if not contested:
        return ""
    methods = {method.name: method for method in COMPARED}
    rows = [
        [
            group.setting,
            group.method,
            methods[group.method].needs,
            *_row(group),
            f"{group.mean('step_seconds'):.1f}",
            f"{group.mean('training_peak_mib'):,.0f}",
        ]
        for setting in contested
        for group in findings.of(setting)
        if group.method in methods
    ]
    balance(findings, contested, tuple(methods), folder / BALANCE)
    headings = ["setting", "method", "needs besides", *_HEADINGS, "s a step", "peak MiB"]
    return (
        "## Ways to keep refusals\n\n"
        f"![refusals kept against look-alikes refused]({BALANCE})\n\n"
        + markdown(headings, rows).rstrip()
    )


_HEADINGS = ("runs", "refused", "each run", "over-refused", "accuracy", "neutral")


def _row(group: Group) -> list[str]:
    refused, *others = shares(group)
    neutral = f"{group.mean('measured', 'neutral'):.2f}"
    return [str(group.runs), refused, by_seed(group), *others, neutral]


def _made(findings: Findings) -> str:
    result = findings.groups[0].results[0]
    recipe, amounts = result["recipe"], result["amounts"]
    runs = sum(group.runs for group in findings.groups)
    base = next((r["base"] for r in findings.aligned.values() if "base" in r), None)
    of = "" if base is None else f" of {base['model']}, {base['parameters'] / 1e6:.0f} M parameters"
    return (
        f"{runs} runs{of}. Aligned by {recipe['epochs']:g} epochs at {recipe['learning_rate']:g}; "
        f"asked {amounts['harmful']} harmful and {amounts['benign']} benign requests, "
        f"{amounts['task']} task rows and {amounts['neutral']} instructions, "
        f"{amounts['new_tokens']} new tokens. torch {result['torch']}, a CPU, fp32."
    )


def _short(findings: Findings) -> str:
    rows = []
    for setting in findings.settings():
        groups = [g for name in SHORT if (g := findings.find(setting, name)) is not None]
        rows += [[setting, group.method, *_row(group), _p(group, groups)] for group in groups]
    if not rows:
        return ""
    return "## In short\n\n" + markdown(["setting", "method", *_HEADINGS, "p"], rows).rstrip()


def _p(group: Group, groups: Sequence[Group]) -> str:
    plain = groups[0]
    return "" if group is plain or plain.method != "plain" else p_value(paired(group, plain))
