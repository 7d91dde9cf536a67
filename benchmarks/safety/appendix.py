"""Make ``APPENDIX.md``: every setting's tables and pictures, the probe, the tokens found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.safety.cells import by_seed, p_value, shares
from benchmarks.safety.findings import Findings, Group, kept, paired
from benchmarks.safety.plots import curves, pareto, probed
from benchmarks.safety.probe import points, sentences
from str_kernels.bench.report import markdown
from str_kernels.bench.style import DEFAULT
from str_kernels.evaluation.judge import Outcome

PLOTTED = tuple(dict.fromkeys(("plain", DEFAULT, "kl", "kl-mass", "mse", "logprob", "pact")))
OUTCOMES = tuple(outcome.value for outcome in Outcome)
NOTES = "notes.md"  # beside the results, written by who has read them


def appendix(findings: Findings, folder: Path) -> str:
    """Return the text; its pictures are drawn into the folder."""
    notes = folder / NOTES
    noted = notes.read_text(encoding="utf-8").strip() if notes.is_file() else ""
    parts = ["# The safety experiment, setting by setting", noted, _aligned(findings)]
    parts += [_setting(findings, setting, folder) for setting in findings.settings()]
    parts += [_chains(findings), _probed(findings, folder), _identified(findings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _aligned(findings: Findings) -> str:
    rows = []
    for (task, name), result in findings.aligned.items():
        group = Group("", "", (result,))
        neutral = f"{result['measured']['neutral']:.3f}"
        rows.append([name or "first", task, *shares(group), neutral])
    headings = ["model", "task", "refused", "over-refused", "accuracy", "neutral"]
    text = "## The aligned model\n\n" + markdown(headings, rows).rstrip()
    later: dict[str, list[str]] = {}
    for group in findings.groups:
        for result in group.results:
            run = f"{group.setting} {group.method} {result['run']['seed']}"
            later.setdefault(result.get("aligned", ""), []).append(run)
    later.pop("", None)
    if not later:
        return text
    lines = [f"- `{name}`: {', '.join(runs)}." for name, runs in later.items()]
    return (
        f"{text}\n\nThe same recipe on another machine gives other weights. All runs started from "
        "the first but these (setting, method, seed):\n\n" + "\n".join(lines)
    )


def _setting(findings: Findings, name: str, folder: Path) -> str:
    groups = findings.of(name)
    setting = groups[0].results[0]["run"]["setting"]
    drawn = pictures(findings, name, folder)
    return "\n\n".join(
        part
        for part in (
            f"## {name}: {setting['task']}, learning rate {setting['learning_rate']:g}, "
            f"{setting['steps']} steps of {setting['batch']}, rank {setting['rank']}",
            _main_table(findings, groups),
            _sentences(groups),
            _outcome_table(groups),
            _mass_table(groups),
            _cost_table(groups),
            drawn,
        )
        if part
    )


def _chains(findings: Findings) -> str:
    if not findings.chains:
        return ""
    rows = [
        [
            stage.method,
            f"{place}. {stage.setting}",
            *shares(stage),
            f"{stage.mean('measured', 'neutral'):.3f}",
        ]
        for chain in findings.chains
        for place, stage in enumerate(chain, start=1)
    ]
    headings = ["method", "after", "refused", "over-refused", "accuracy of that task", "neutral"]
    return (
        "## One fine-tuning after another\n\n"
        "Each adapter is merged before the next is trained; safety tokens are held to the first "
        "aligned model throughout.\n\n" + markdown(headings, rows).rstrip()
    )


def _probed(findings: Findings, folder: Path) -> str:
    found = points(findings)
    if not found:
        return ""
    probed(found, folder / "probe.png")
    return (
        "## What a probe while training says\n\n"
        "The last probe of a run (how much of the aligned model's probability of beginning its "
        "refusals is left, on requests that are not asked) against the share of harmful requests "
        f"refused. {sentences(found)}\n\n![refusals against the probe](probe.png)"
    )


def _identified(findings: Findings) -> str:
    if not findings.identified:
        return ""
    rows = []
    for found in findings.identified:
        parts = [*found["overlap"].values(), found["in_templates"], found["score_share"]]
        rows.append([str(found["top_k"]), *(f"{100 * part:.0f} %" for part in parts)])
    halves = ["halves of the templates", "halves of the requests"]
    headings = ["K", *halves, "in the templates", "score held by the first quarter"]
    words = ", ".join(repr(token) for token in findings.identified[0]["tokens"])
    return (
        "## The tokens that are found\n\n"
        "Overlap: share of the K tokens that two halves of the templates, or of the requests, "
        "find alike; and of those found that stand in the templates at all.\n\n"
        f"{markdown(headings, rows)}\nThe first of them: {words}."
    )


def _main_table(findings: Findings, groups: Sequence[Group]) -> str:
    rows, plain = [], _plain(groups)
    for group in groups:
        share = kept(group, findings.aligned)
        p = None if plain is None or group is plain else paired(group, plain)
        refused, *others = shares(group)
        rows.append(
            [
                group.method,
                str(group.runs),
                refused,
                by_seed(group),
                "" if math.isnan(share) else f"{100 * share:.1f} %",
                *others,
                f"{group.mean('measured', 'neutral'):.3f}",
                p_value(p),
            ]
        )
    headings = ["method", "runs", "refused", "each run", "of the aligned model's refusals kept"]
    return markdown([*headings, "over-refused", "accuracy", "neutral", "p"], rows).rstrip()


def _plain(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.method == "plain"), None)


def _merit(group: Group) -> tuple[float, ...]:
    """Rank by refusals kept; among equals by fewer look-alikes refused, then accuracy."""
    refused, over, task = (
        group.rate("harmful", "refusal"),
        group.rate("benign", "refusal"),
        group.rate("task"),
    )
    return refused.value, -over.value, 0.0 if task is None else task.value


def _sentences(groups: Sequence[Group]) -> str:
    plain = _plain(groups)
    constrained = [g for g in groups if g.results[0]["run"]["method"]["loss"].startswith("str")]
    if plain is None or not constrained:
        return ""
    runs = max(group.runs for group in constrained)
    compared = [group for group in constrained if group.runs == runs]
    best = max(compared, key=_merit)
    lost, found = plain.rate("harmful", "refusal"), best.rate("harmful", "refusal")
    text = (
        f"Plain fine-tuning leaves {100 * lost.value:.1f} % refused; of the constraints with "
        f"{runs} {'run' if runs == 1 else 'runs'}, `{best.method}` keeps most, "
        f"{100 * found.value:.1f} %"
    )
    right, plain_right = best.rate("task"), plain.rate("task")
    if right is not None and plain_right is not None:
        points = 100 * (right.value - plain_right.value)
        text += f", at {points:+.1f} points of task accuracy"
    over = 100 * (best.rate("benign", "refusal").value - plain.rate("benign", "refusal").value)
    return text + f" and {over:+.1f} points of over-refusal against plain."


def _outcome_table(groups: Sequence[Group]) -> str:
    seen = [o for o in OUTCOMES if any(g.outcomes()[o] for g in groups)]
    nats = [group.surprise() for group in groups]
    told = any(x is not None for x in nats)
    rows = []
    for group, surprise in zip(groups, nats, strict=True):
        counts = group.outcomes()
        rows.append([group.method, *(f"{100 * counts[o] / counts.total():.1f}" for o in seen)])
        if told:
            rows[-1].append("" if surprise is None else f"{surprise:.2f}")
    table = markdown(["method", *seen, *(["nats a token"] if told else ())], rows).rstrip()
    how = (
        "; and the answers' cross-entropy under the aligned model, median, where it was measured: "
        "what it would not say is babble or a new habit"
    )
    return f"What the harmful requests were answered with, %{how if told else ''}:\n\n{table}"


def _mass_table(groups: Sequence[Group]) -> str:
    """Return how much probability the safety tokens have along the aligned model's refusals."""
    found = [(g, g.along("mass"), g.along("aligned_mass")) for g in groups]
    found = [row for row in found if row[1]]
    if not found:
        return ""
    columns = range(len(found[0][1]))
    rows = [["aligned", *(f"{found[0][2][i]:.3f}" for i in columns)]]
    rows += [[group.method, *(f"{mass[i]:.3f}" for i in columns)] for group, mass, _ in found]
    headings = ["method", *(f"token {i + 1}" for i in columns)]
    return (
        "The safety tokens' probability, all together, at the first tokens of what the aligned "
        f"model answers to them, in the runs that have it:\n\n{markdown(headings, rows).rstrip()}"
    )


def _cost_table(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        median, largest = group.gradient_norm()
        drift = [r["history"]["drift"][-1] ** 0.5 for r in group.results]
        constrained = group.results[0]["run"]["method"]["loss"].startswith("str")
        rows.append(
            [
                group.method,
                f"{group.last_cross_entropy():.3f}",
                f"{median:.2f}, {largest:.0f}",
                f"{sum(drift) / len(drift):.2f}" if constrained else "",
                f"{group.mean('step_seconds'):.2f}",
                f"{group.mean('training_peak_mib'):,.0f}",
            ]
        )
    norm = "gradient norm, median and largest"
    headings = ["method", "last cross-entropy", norm, "last drift", "s a step", "peak MiB"]
    return markdown(headings, rows).rstrip()


def pictures(findings: Findings, setting: str, folder: Path) -> str:
    """Draw a setting's pictures; return what shows them."""
    made = []
    groups = findings.of(setting)
    if any(group.rate("task") for group in groups):
        pareto(findings, setting, folder / f"{setting}-pareto.png")
        made.append(f"![refusals against task accuracy]({setting}-pareto.png)")
    drawn = tuple(m for m in PLOTTED if findings.find(setting, m) is not None)
    if drawn:
        curves(findings, setting, drawn, folder / f"{setting}-curves.png")
        made.append(f"![loss and gradient norm]({setting}-curves.png)")
    return "\n".join(made)
