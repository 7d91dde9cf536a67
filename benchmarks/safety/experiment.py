"""Run the whole experiment, one line of results a run; it continues where it was interrupted.

Stage: base model and data → aligned model, measured → every `Run` of the plan that has no result.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from benchmarks.safety.align import Recipe, align, fingerprint
from benchmarks.safety.baselines import safe_lora
from benchmarks.safety.coherence import surprise
from benchmarks.safety.data import REFUSALS, load_split
from benchmarks.safety.findings import FILE, SCHEMA
from benchmarks.safety.finetune import finetune
from benchmarks.safety.identification import identification
from benchmarks.safety.mass import held_mass
from benchmarks.safety.measure import Amounts, measure
from benchmarks.safety.methods import KL, Chain, Run
from benchmarks.safety.probe import REQUESTS, RunProbe
from benchmarks.safety.tokens import token_ids
from str_kernels.bench.report import Row, circumstances, commit, read_rows, write_rows
from str_kernels.cli.console import quiet_libraries, say
from str_kernels.evaluation.answers import AnswerFile
from str_kernels.evaluation.evaluation import answer_rows
from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.version import __version__

TOKENS = "tokens"


@dataclass(frozen=True)
class Places:
    """Where everything is.

    Args:
        model: base model, a folder or Hub id.
        data: folder of the JSON Lines files.
        work: folder of what can be made again: the aligned model, references, tokens.
        results: folder of the results.
    """

    model: str
    data: Path
    work: Path
    results: Path

    @property
    def aligned(self) -> Path:
        """Folder of the aligned model."""
        return self.work / "aligned"

    @property
    def derived(self) -> Path:
        """Folder inside the aligned model's, for tokens and references derived from that model."""
        folder = self.aligned / "derived"
        folder.mkdir(exist_ok=True)
        return folder

    def rows(self) -> list[Row]:
        """Return the results that are there."""
        path = self.results / FILE
        return read_rows(path, SCHEMA)[1] if path.is_file() else []

    def add(self, row: Row) -> None:
        """Write a result behind those that are there; runs side by side do so in turns."""
        with FileLock(self.results / f"{FILE}.lock"):
            write_rows(self.results / FILE, {"schema": SCHEMA}, [*self.rows(), row])

    def answers(self, name: str, amounts: Amounts) -> AnswerFile:
        """Open a new file for what a model answers, so that it can be judged again."""
        folder = self.work / "answers"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        return AnswerFile(path, asdict(amounts))


def experiment(
    places: Places, runs: Sequence[Run | Chain], recipe: Recipe, amounts: Amounts, workers: int
) -> None:
    """Do all that has no result yet; workers share the cores evenly."""
    for folder in (places.work, places.results):
        folder.mkdir(parents=True, exist_ok=True)
    align(places.model, places.data, places.aligned, recipe, say)
    started_from = fingerprint(places.aligned)
    singles = [run for part in runs for run in getattr(part, "runs", (part,))]
    tasks = list(dict.fromkeys(run.setting.task for run in singles))
    names = [f"{task}--{started_from}" for task in tasks]
    jobs: list[tuple] = [(_baseline, places, name, recipe, amounts) for name in names]
    jobs.append((_tokens, places, TOKENS, recipe, amounts))
    for part in runs:
        function = _chain if isinstance(part, Chain) else _run
        jobs.append((function, places, part, recipe, amounts))
    there = {row["name"] for row in places.rows()}
    missing = [job for job in jobs if _name(job) not in there]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} results are there")
    threads = max(1, _cores() // workers)
    context = multiprocessing.get_context("spawn")
    # one process a run: its peak memory is its own
    with context.Pool(workers, _start, (threads,), maxtasksperchild=1) as pool:
        do = functools.partial(_do, started_from=started_from)
        for name in pool.imap_unordered(do, missing, chunksize=1):
            say(f"saved {name}")


def _cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    quiet_libraries()


def _name(job: tuple) -> str:
    function, _, subject, *_ = job
    if function is _baseline:
        return f"aligned--{subject}"
    return subject if isinstance(subject, str) else subject.name


def _do(job: tuple, started_from: str) -> str:
    name, began = _name(job), time.perf_counter()
    function, places, subject, recipe, amounts = job
    result = function(places, subject, amounts)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result |= {
        "version": __version__,
        "torch": torch.__version__,
        "commit": commit(),
        "aligned": started_from,
        "circumstances": circumstances(),
        "recipe": asdict(recipe),
        "amounts": asdict(amounts),
        "seconds": round(time.perf_counter() - began),
        "peak_mib": usage.ru_maxrss // 1024,
    }
    places.add({"name": name, **result})
    return name


def _baseline(places: Places, name: str, amounts: Amounts) -> dict[str, Any]:
    model, tokenizer = load_model_and_tokenizer(str(places.aligned), dtype="float32")
    known, task = places.answers(f"aligned--{name}", amounts), name.split("--")[0]
    base = {
        "model": Path(places.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    measured = measure(model, tokenizer, places.data, task, amounts=amounts, known=known)
    return {"base": base, "measured": measured.as_dict()}


def _tokens(places: Places, name: str, amounts: Amounts) -> dict[str, Any]:
    model, tokenizer = load_model_and_tokenizer(str(places.aligned), dtype="float32")
    return {"identified": [identification(model, tokenizer, top_k) for top_k in (64, 256)]}


def _run(places: Places, run: Run, amounts: Amounts) -> dict[str, Any]:
    loaded = load_model_and_tokenizer(str(places.aligned), dtype="float32")
    return _tuned(places, run, amounts, loaded, name=run.name)[1]


def _chain(places: Places, chain: Chain, amounts: Amounts) -> dict[str, Any]:
    aligned, tokenizer = load_model_and_tokenizer(str(places.aligned), dtype="float32")
    model, _ = load_model_and_tokenizer(str(places.aligned), dtype="float32")
    stages = []
    for run in chain.runs:
        name, loaded = f"{chain.name}--{len(stages)}", (model, tokenizer)
        tuned, result = _tuned(places, run, amounts, loaded, name=name, aligned=aligned)
        stages.append(result)
        model = tuned.merge_and_unload()
    return {"stages": stages}


def _base(places: Places) -> torch.nn.Module:
    """Load the model before it was aligned."""
    return load_model_and_tokenizer(places.model, dtype="float32")[0]


def _tuned(
    places: Places,
    run: Run,
    amounts: Amounts,
    loaded: tuple[Any, Any],
    *,
    name: str,
    aligned: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Fine-tune a loaded model and measure it; return it with the result."""
    model, tokenizer = loaded
    held = token_ids(KL, model if aligned is None else aligned, tokenizer, places.derived)
    folders = {"data": places.data, "work": places.derived}
    requests = load_split(places.data, REFUSALS).test
    others = requests[amounts.harmful :][:REQUESTS]
    probe = RunProbe.of(model if aligned is None else aligned, tokenizer, others, held)
    more = {"aligned": aligned, "probe": probe, "say": say}
    tuned, history = finetune(model, tokenizer, run, **folders, **more)
    if run.method.loss == "safe_lora":
        say(f"{run.name}: projected {safe_lora(tuned, _base(places))} layers")
    if probe is not None:
        probe.after(tuned, run.setting.steps, last=True)
    trained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    asked = {"amounts": amounts, "known": places.answers(name, amounts)}
    measured = measure(tuned, tokenizer, places.data, run.setting.task, **asked)
    harmful = requests[: amounts.harmful]
    limit = {"max_new_tokens": amounts.new_tokens, "known": asked["known"]}
    answers = answer_rows(tuned, tokenizer, harmful, **limit)
    return tuned, {
        "run": run.as_dict(),
        "measured": measured.as_dict(),
        "surprise": surprise(tuned, aligned, tokenizer, harmful, answers),
        "mass": held_mass(tuned, aligned, tokenizer, harmful, held),
        "probe": None if probe is None else probe.as_dict(),
        "step_seconds": round(statistics.median(history.seconds), 3),
        "training_peak_mib": trained,
        "history": history.as_dict(),
    }
