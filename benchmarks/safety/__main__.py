"""``python -m benchmarks.safety run`` goes on with the experiment; ``report`` writes it up.

The run takes hours on a CPU and may be stopped at any time: each result is written at once.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS
from benchmarks.safety.methods import Plan

app = typer.Typer(add_completion=False, help=__doc__)
FOLDER = RESULTS / "safety"


@app.command()
def run(
    *,
    model: Annotated[str, typer.Option(help="Base model: local folder or Hub id.")],
    data: Annotated[Path, typer.Option(help="Folder of the JSON Lines files.", exists=True)],
    work: Annotated[Path, typer.Option(help="Folder of what can be made again.")],
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of runs, * allowed, in this order.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs side by side.", min=1)] = os.cpu_count() or 1,
) -> None:
    """Align, fine-tune and measure all that has no result yet."""
    from benchmarks.safety.align import Recipe
    from benchmarks.safety.experiment import Places, experiment
    from benchmarks.safety.measure import Amounts

    everything = (*Plan().runs, *Plan().chains)
    wanted = (r for o in only or ["*"] for r in everything if fnmatch.fnmatch(r.name, o))
    runs = list(dict.fromkeys(wanted))
    if not runs:
        raise typer.BadParameter(f"no run is named like {', '.join(only or [])}.")
    places = Places(model, data.resolve(), work.resolve(), results.resolve())
    experiment(places, runs, Recipe(), Amounts(), workers)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the results.", exists=True)] = FOLDER,
) -> None:
    """Write REPORT.md and its pictures from the results."""
    from benchmarks.safety.report import write

    typer.echo(f"saved {write(results)}")


if __name__ == "__main__":
    app()
