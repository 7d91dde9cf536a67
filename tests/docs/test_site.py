"""The documentation's site builds without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `docs/CONTRIBUTING.md` says."""
    mkdocs = shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip('mkdocs is not installed: pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_it_builds_without_a_warning(site):
    """`mkdocs build --strict`: every link, anchor and documented name is there."""
    assert (site / "index.html").is_file()
    assert (site / "benchmarks/results/safety/REPORT/index.html").is_file()


def test_every_message_is_listed(site):
    """The page of errors has the list that is read from the code."""
    page = (site / "troubleshooting/index.html").read_text(encoding="utf-8")
    assert "such as AutoModelForCausalLM gives." in page
    assert page.count("<li><code>") > 200


def test_every_public_name_is_in_the_reference(site):
    """The API page shows what `str_kernels.__all__` lists."""
    import str_kernels

    page = (site / "api/index.html").read_text(encoding="utf-8")
    for name in set(str_kernels.__all__) - {"__version__"}:
        assert f'id="str_kernels.{name}"' in page or re.search(rf'id="[\w.]+\.{name}"', page), name


def test_every_page_is_in_the_navigation():
    """A page that no menu shows is not found."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in listed, page.name
