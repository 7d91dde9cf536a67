"""`str-kernels plan`: what a training step will take, and which levers make a context fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from str_kernels.cli import console
from str_kernels.cli.options import AsJson, ModelName


def plan(
    model: ModelName,
    *,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence. Default: 8192, or the model's positions."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of the device, such as 24. Default: no limit.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in one forward.")] = 1,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    dtype: Annotated[
        str,
        typer.Option(
            help="Body: auto (the checkpoint's), float32, bfloat16, float16, nf4 or int8."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Whose kernels run: cuda or cpu.")] = "cuda",
    processes: Annotated[
        int, typer.Option(help="Data-parallel processes; each has the whole model.")
    ] = 1,
    safety_tokens: Annotated[
        int, typer.Option(help="Tokens of the constraint; 0: no constraint and no reference pass.")
    ] = 64,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Plan with this lever alone.")
    ] = False,
    offload: Annotated[
        str | None, typer.Option(help="Plan with checkpoints that wait here: cpu or disk.")
    ] = None,
    tile_tokens: Annotated[
        int | None, typer.Option(help="Plan with MLPs that run over so many tokens at a time.")
    ] = None,
    tile_all: Annotated[
        bool,
        typer.Option("--tile-all", help="Plan with projections and norms in these tiles, too."),
    ] = False,
    window_attention: Annotated[
        bool,
        typer.Option("--window-attention", help="Plan with sliding windows that have no mask."),
    ] = False,
    fused_head: Annotated[
        bool | None,
        typer.Option(
            "--fused-head/--own-head", help="Plan with the fused head, or with the model's own."
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the bars into this file.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run two steps at a shorter context on this CPU, and compare."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count the memory of a LoRA training step, from the configuration of a model alone.

    Without options for levers every usual set of them is counted, the cheapest in time first. With
    one such option, that set alone; the fused head is part of it unless --own-head is given.
    """
    if png is not None:
        console.check_output("png", png)
    given = {
        "memory": memory,
        "batch": batch,
        "rank": rank,
        "dtype": dtype,
        "device": device,
        "processes": processes,
        "safety_tokens": safety_tokens,
    }
    with console.stage("building the model without its weights"):
        from str_kernels.cli import plan_view
        from str_kernels.planning import Levers
        from str_kernels.planning import plan as count

        console.quiet_libraries()
    levers = None
    body = {
        "gradient_checkpointing": gradient_checkpointing,
        "offload": offload,
        "tile_tokens": tile_tokens,
        "tile_all": tile_all,
        "window_attention": window_attention,
    }
    if any(body.values()) or fused_head is not None:
        levers = Levers(**body, fused_head=fused_head is not False)
    found = count(
        model,
        context=context,
        levers=levers,
        told=lambda words: console.say(f"counting {words} …"),
        **given,
    )
    checked = plan_view.checked(found) if check else []
    if as_json:
        console.print_json({**found.as_dict(), "checks": checked})
    else:
        plan_view.show(found, checked)
    if png is not None:
        from str_kernels.planning.plots import draw

        draw(found, png)
        console.say(f"saved {png}")
    console.say(plan_view.next_command(found))
