"""Options of a command that come from the fields of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer


def options_of(settings: type) -> Callable[[Callable], Callable]:
    """Give a command an option for each field that has a help text, in place of ``**keywords``.

    Options of the command itself keep their place before them; a last ``as_json`` stays the last.
    """

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p for p in own if p.kind is not Parameter.VAR_KEYWORD and p.name != "as_json"]
        last = [p for p in own if p.name == "as_json"]
        types = get_type_hints(settings)
        made = [_option(f, types[f.name]) for f in fields(settings) if "help" in f.metadata]
        keywords = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*made, *last)]
        command.__signature__ = inspect.Signature([*kept, *keywords])
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
