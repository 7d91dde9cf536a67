"""`str-kernels`: the commands, and how their errors reach a user.

The result goes to stdout, everything else to stderr. The exit code is 0; 2 for a wrong command line
or a file that cannot be used; 1 for another failure, such as a full disk. Each gives one readable
message; `--debug` adds the trace. Of several processes the first alone writes, and the one that
fails first gives the message.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated

import typer

from str_kernels.cli.bench import bench
from str_kernels.cli.cache import cache
from str_kernels.cli.demo import demo
from str_kernels.cli.doctor import doctor
from str_kernels.cli.evaluate import evaluate
from str_kernels.cli.plan import plan
from str_kernels.cli.tokens import tokens
from str_kernels.cli.train import train
from str_kernels.ranks import fails_first, is_first, launched, leave
from str_kernels.version import __version__

PROGRAM = "str-kernels"
_HEARD = 10  # seconds in which the first process says what all of them found
DEBUG_VARIABLE = "STR_KERNELS_DEBUG"

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Example: {PROGRAM} doctor",
)
for command, example in (
    (demo, "demo --out demo"),
    (doctor, "doctor --kernels --arch 90"),
    (tokens, "tokens ./my-model --out tokens.json --top-k 64"),
    (cache, "cache ./my-model data.jsonl --tokens tokens.json --out refs.safetensors"),
    (train, "train ./my-model data.jsonl --out adapter --tokens tokens.json --steps 100"),
    (
        evaluate,
        "evaluate ./my-model --adapter ./adapter --refusals refusals.jsonl --task task.jsonl "
        "--out result.json",
    ),
    (plan, "plan ./my-model --context 32768 --memory 24 --dtype nf4"),
    (bench, "bench --quick --out bench"),
):
    app.command(epilog=f"Example: {PROGRAM} {example}")(command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the stack trace of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Fine-tune language models with LoRA on little memory, and keep their refusals."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get(DEBUG_VARIABLE) == "1"
    given = [argument for argument in given if argument != "--debug"]  # wherever it stands
    try:
        with _one_voice(debug):
            app(args=given, prog_name=PROGRAM)
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        if fails_first():
            sys.stderr.write(f"error{_where()}: {error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except RuntimeError:  # the other processes lose a group when one has left it
        if debug or fails_first():
            raise
        sys.exit(1)


@contextmanager
def _one_voice(debug: bool) -> Iterator[None]:
    """Of several processes let the first one write; at the end all leave their group."""
    if launched() > 1:  # torch's own log of the same in each process; read when torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with ExitStack() as stack:
        if not (is_first() or debug):
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            yield
        except SystemExit as end:  # how typer ends a command, also a good one
            if not end.code:
                leave()
            elif not is_first():  # the launcher ends all with the first that ends, and this is mute
                time.sleep(_HEARD)
            raise


def _where() -> str:
    count = launched()
    return f" (process {os.environ['RANK']} of {count})" if count > 1 else ""


if __name__ == "__main__":
    main()
