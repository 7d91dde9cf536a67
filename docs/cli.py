"""Writes ``docs/cli.md`` from the command line itself: ``python docs/cli.py``."""

from __future__ import annotations

import inspect
import re
from inspect import Parameter
from pathlib import Path
from typing import Any, get_args

from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from str_kernels.cli.main import PROGRAM, app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

<!-- written by docs/cli.py; do not edit -->

Results go to standard output, progress and remarks to standard error. The exit code is 0; 2 for a
wrong command line or a file that cannot be used; 1 for another failure, such as a full disk.
`--debug`, wherever it stands, or `STR_KERNELS_DEBUG=1` shows the stack trace of an error.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *map(_section, app.registered_commands)])


def _section(command: CommandInfo) -> str:
    function = command.callback
    found = inspect.signature(function, eval_str=True).parameters.values()
    arguments = [p for p in found if isinstance(_info(p), ArgumentInfo)]
    options = [p for p in found if isinstance(_info(p), OptionInfo)]
    usage = " ".join([PROGRAM, function.__name__, *(p.name.upper() for p in arguments)])
    example = str(command.epilog).removeprefix("Example: ")
    lines = [f"## {function.__name__}", "", _text(function.__doc__), ""]
    lines += ["```text", f"{usage} [OPTIONS]", "```", "", "For example:", ""]
    lines += ["```sh", example, "```", ""]
    for title, parameters in (("argument", arguments), ("option", options)):
        if parameters:
            lines += [f"| {title} | default | |", "| --- | --- | --- |"]
            lines += [*map(_row, parameters), ""]
    return "\n".join(lines)


def _info(parameter: Parameter) -> Any:
    """Return typer's description of a parameter."""
    return get_args(parameter.annotation)[1]


def _row(parameter: Parameter) -> str:
    info, default = _info(parameter), parameter.default
    if isinstance(info, ArgumentInfo):
        shown = parameter.name.upper()
    else:
        # typer takes the first name inside Annotated for a default value
        given = [name for name in (info.default, *(info.param_decls or ())) if name is not ...]
        names = given or ["--" + parameter.name.replace("_", "-")]
        shown = " ".join([*names, *_value(parameter)])
    told = "required" if default is Parameter.empty else f"`{default}`"
    told = "" if default is None or default is False else told
    return f"| `{shown}` | {told} | {_text(info.help)} |"


def _value(parameter: Parameter) -> list[str]:
    """Name what an option takes, if it takes something."""
    kind, info = get_args(parameter.annotation)
    for inner, word in ((bool, ""), (int, "INTEGER"), (float, "NUMBER"), (Path, "PATH")):
        if kind is inner or inner in get_args(kind):
            return [info.metavar or word] if word else []
    return [info.metavar or "TEXT"]


def _text(text: str | None) -> str:
    """Write help as Markdown: one line a paragraph, and no mark of a table in it."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(" ".join(part.split()) for part in paragraphs).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
