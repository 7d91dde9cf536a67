"""`docs/cli.md` is what the command line says of itself."""

from __future__ import annotations

import pytest

from tests.docs.reading import load


@pytest.fixture(scope="module")
def generator():
    """The module ``docs/cli.py``."""
    return load("cli")


def test_the_page_is_up_to_date(generator):
    """After a change of an option: python docs/cli.py."""
    assert generator.page() == generator.PAGE.read_text(encoding="utf-8"), "run: python docs/cli.py"


def test_every_option_is_on_it(generator):
    """Each option that ``--help`` takes, by its own name."""
    from typer.testing import CliRunner

    from str_kernels.cli.main import app

    page = generator.page()
    for command in app.registered_commands:
        name = command.callback.__name__
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        shown = CliRunner().invoke(app, [name, "--help"], terminal_width=200).output
        told = {word.strip(",") for word in shown.split() if word.startswith("--")}
        options = {word for word in told if word.strip("-").replace("-", "").isalpha()}
        missing = {option for option in options - {"--help"} if option not in section}
        assert not missing, name
