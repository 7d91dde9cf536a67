"""Calling the command line as a user does, inside this process."""

from typing import NamedTuple

import pytest


class Called(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture, *arguments: object) -> Called:
    """Run ``str-kernels`` with these arguments."""
    from str_kernels.cli.main import main

    code = 0
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return Called(code, *capsys.readouterr())
