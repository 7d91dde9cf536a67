"""`str-kernels demo`: the whole method on a model made on the spot, in a minute or two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from str_kernels.cli import console
from str_kernels.cli.options import AsJson
from str_kernels.files import write_json
from str_kernels.ranks import require_one
from str_kernels.version import run_versions

if TYPE_CHECKING:
    from str_kernels.demo.run import DemoResult

# Torch reads these when it is imported. Threads that wait busily for each other make a step of a
# tiny model twenty times as long where cores are shared, and the profiler would print a notice.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "6"}
THREADS = 2  # at this size more threads only wait


def demo(
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for demo.png and demo.json; created if missing.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for seconds; the numbers then mean little.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Align a tiny model, fine-tune it plainly and with STR, and compare their refusals.

    It needs this package alone: model, tokenizer and text are made on the spot, on the CPU.
    """
    require_one("demo")
    _check_folder(out)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with console.stage("loading"):
        console.quiet_libraries()
        import torch

        from str_kernels.demo import report
        from str_kernels.demo.run import DemoSettings, run_demo

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    result = run_demo(DemoSettings.quick(seed) if quick else DemoSettings(seed=seed), console.say)
    content = report.as_json(result, run_versions())
    if as_json:
        console.print_json(content)
    else:
        _show(result)
    write_json(out / "demo.json", content)
    report.save_plot(result, out / "demo.png")
    console.say(f"saved {out / 'demo.json'} and {out / 'demo.png'}")
    console.say("next: str-kernels train MODEL DATA.jsonl --out ADAPTER, with a model of your own")


def _show(result: DemoResult) -> None:
    from str_kernels.demo import report

    prompts, head = result.settings.prompts, result.settings.head
    console.print_table(f"{prompts} held-out prompts of each kind", *report.behaviour_rows(result))
    console.print_table(f"fp32 head, {head}, frozen weight", *report.head_rows(result))
    request, *answers = report.example_rows(result)
    console.print_table(f"“{request}”", *answers)
    typer.echo("STR holds the logits of: " + ", ".join(result.tokens) + ".")
    typer.echo(report.verdict(result))
    console.say(f"took {result.seconds:.0f} seconds")


def _check_folder(folder: Path) -> None:
    """Create the folder and check that it can be written, before the slow part."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be created ({error.strerror}).") from error
    console.check_output("out", folder / "demo.json")
    console.check_output("out", folder / "demo.png")
