"""`str-kernels demo`: the whole method on a model made on the spot, in a minute or two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from str_kernels.cli.console import (
    print_json,
    print_table,
    quiet_libraries,
    say,
    stage,
)
from str_kernels.files import write_json
from str_kernels.version import run_versions

if TYPE_CHECKING:
    from str_kernels.demo.run import DemoResult

# Read by torch when it is imported. Threads that wait busily for each other cost a tiny model
# twenty times its step where cores are shared; and the profiler would announce itself.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "6"}
THREADS = 2  # more only wait, at this size


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for demo.png and demo.json; made if need be.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of a minute; its numbers mean little.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Align a tiny model, fine-tune it plainly and with STR, and compare their refusals.

    Needs nothing but this package: model, tokenizer and text are made on the spot, on the CPU.
    """
    if out is not None:
        _check_folder(out)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with stage("loading"):
        quiet_libraries()
        import torch

        from str_kernels.demo import report
        from str_kernels.demo.run import DemoSettings, run_demo

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    result = run_demo(DemoSettings.quick(seed) if quick else DemoSettings(seed=seed), say)
    content = report.as_json(result, run_versions())
    if as_json:
        print_json(content)
    else:
        _show(result)
    if out is not None:
        write_json(out / "demo.json", content)
        report.save_plot(result, out / "demo.png")
        say(f"saved {out / 'demo.json'} and {out / 'demo.png'}")
    say("next: str-kernels train MODEL DATA.jsonl --out ADAPTER, with a model of your own")


def _show(result: DemoResult) -> None:
    from str_kernels.demo import report

    prompts = result.settings.prompts
    print_table(f"{prompts} held-out prompts of each kind", *report.behaviour_rows(result))
    print_table(f"fp32 head, {result.head.size}, frozen weight", *report.head_rows(result))
    request, *answers = report.example_rows(result)
    print_table(f"“{request}”", *answers)
    typer.echo("Held by STR: " + ", ".join(result.tokens) + ".")
    typer.echo(report.verdict(result))
    say(f"took {result.seconds:.0f} seconds")


def _check_folder(folder: Path) -> None:
    """Make the folder now and see that it can be written, before the slow part."""
    from str_kernels.cli.console import check_output

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be made ({error.strerror}).") from error
    check_output("out", folder / "demo.json")
    check_output("out", folder / "demo.png")
