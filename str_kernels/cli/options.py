"""Options that several commands have, and those that come from the fields of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

ModelName = Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")]
DataFile = Annotated[
    str,
    typer.Argument(
        help='JSONL: {"prompt", "response"}, or {"messages"} and perhaps {"tools"}, on each line. '
        'An assistant\'s message with "weight": 0 is read and not learned.'
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
BatchSize = Annotated[
    int, typer.Option("--batch", "--batch-size", help="Sequences in one forward.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def options_of(settings: type, *names: str) -> Callable[[Callable], Callable]:
    """Give a command options for fields of its settings, in place of its ``**keywords``.

    They come after the command's own options, except for ``as_json``, which stays last.

    Args:
        settings: a dataclass whose fields ``setting`` made.
        names: the fields; none for every field that has a help text.
    """

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p for p in own if p.kind is not Parameter.VAR_KEYWORD and p.name != "as_json"]
        last = [p for p in own if p.name == "as_json"]
        types = get_type_hints(settings)
        chosen = [f for f in fields(settings) if "help" in f.metadata]
        made = [_option(f, types[f.name]) for f in chosen if not names or f.name in names]
        command.__signature__ = inspect.Signature([*kept, *made, *last])
        return command

    return decorate


def _option(field: Field, type_: Any) -> Parameter:
    flags = ["--" + field.name.replace("_", "-")] if type_ is bool else []
    shown = typer.Option(*flags, help=field.metadata["help"])
    given = field.metadata["option"] or type_
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(default) or None
    annotation = Annotated[given, shown]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
