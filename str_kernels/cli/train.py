"""`str-kernels train`: LoRA fine-tuning with the fused, safety-constrained loss."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from str_kernels.cli.options import AsJson, DataFile, ModelName, options_of
from str_kernels.training.settings import TrainSettings


@options_of(TrainSettings)
def train(
    model: ModelName,
    data: DataFile,
    *,
    out: Annotated[str, typer.Option(help="Folder for the adapter and its description.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")
    ] = False,
    no_safety: Annotated[
        bool, typer.Option("--no-safety", help="Use the fused loss without the constraint.")
    ] = False,
    unpatched: Annotated[
        bool, typer.Option("--unpatched", help="Use the model's own head, for comparison.")
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Fine-tune a LoRA adapter while the constraint holds the logits of the safety tokens.

    Only responses are learned. Ctrl-C finishes the step and saves; --resume continues from there.
    """
    if no_safety and unpatched:
        raise typer.BadParameter("give one of --no-safety and --unpatched, not both.")
    method = "unpatched" if unpatched else "plain" if no_safety else "str"

    from str_kernels.cli.training_view import run_training

    given = {"model": model, "data": data, "out": out, "method": method, **settings}
    run_training(given, resume=resume, as_json=as_json)
