"""`str-kernels train`: LoRA fine-tuning with the fused, safety-constrained loss."""

from __future__ import annotations

from typing import Annotated

import typer

from str_kernels.options import DEFAULT_KIND


def train(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    data: Annotated[
        str, typer.Argument(help='JSONL: {"prompt", "response"} or {"messages"} on each line.')
    ],
    out: Annotated[str, typer.Option(help="Folder for the adapter and its description.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    no_safety: Annotated[
        bool, typer.Option("--no-safety", help="The fused loss alone, no constraint.")
    ] = False,
    unpatched: Annotated[
        bool, typer.Option("--unpatched", help="The model's own head, for comparison.")
    ] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Safety tokens file; default: identify at the start.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many tokens to identify.")] = 64,
    strength: Annotated[
        str | None,
        typer.Option(help="Weight of the constraint; default: 10 for kl, 0.1 for the others."),
    ] = None,
    kind: Annotated[str, typer.Option(help="mse, logprob or kl.")] = DEFAULT_KIND,
    positions: Annotated[
        str, typer.Option(help="all, labels, or a number k: the first k of each response.")
    ] = "all",
    anchors: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL like the data, of which a row joins every batch, held and not learned; "
            "give refused requests in one file, benign look-alikes in another."
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(help="adapter_off, cache, or a cache file.")
    ] = "adapter_off",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; default: 2 x rank.")] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="Modules to adapt, comma-separated; all-linear leaves the head out.")
    ] = "all-linear",
    learning_rate: Annotated[float, typer.Option(help="The largest one.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "linear",
    warmup: Annotated[float, typer.Option(help="Steps, or a share of them below 1.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients; 0: never.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of one forward.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forwards of one step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 2048,
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32, bfloat16, float16, mixed-bfloat16 or mixed-float16."),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of adapter, dropout and data order.")] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.")] = 0,
    logging_steps: Annotated[int, typer.Option(help="Steps between log lines.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
) -> None:
    """Fine-tune a LoRA adapter and hold the logits of its safety tokens.

    Only responses are learned. Ctrl-C finishes the step and saves; --resume goes on from there.
    """
    given = {name: value for name, value in locals().items() if name not in _NOT_SETTINGS}
    given["target_modules"] = tuple(name.strip() for name in target_modules.split(",") if name)
    given["anchors"] = tuple(anchors or ())
    given["method"] = _method(no_safety, unpatched)

    from str_kernels.cli.training_view import run_training

    run_training(given, resume=resume, as_json=as_json)


_NOT_SETTINGS = ("resume", "no_safety", "unpatched", "as_json")


def _method(no_safety: bool, unpatched: bool) -> str:
    if no_safety and unpatched:
        raise typer.BadParameter("give one of --no-safety and --unpatched, not both.")
    if unpatched:
        return "unpatched"
    return "plain" if no_safety else "str"
