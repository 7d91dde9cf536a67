"""The distributions hold what they should, and the tests test the one that is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "str_kernels"
SOURCES = [
    *("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"),
    *("CITATION.cff", "mkdocs.yml"),
    *(".ci", "benchmarks", "docs", "str_kernels", "tests"),
]
NOT_KEPT = {"__pycache__", "quick"}


def files_of(name: str) -> set[str]:
    """The files of the tree that belong into the source distribution."""
    path = ROOT / name
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    relative = [p.relative_to(ROOT) for p in found]
    return {p.as_posix() for p in relative if not NOT_KEPT & set(p.parts) and p.suffix != ".lock"}


def build(kind: str, tree: Path) -> Path:
    """Call the build backend as pip does, in a process whose folder is the tree."""
    out = tree.parent / kind
    out.mkdir()
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in an sdist of the tree, and those in the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    for name in SOURCES:
        for file in files_of(name):
            (folder / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / "tree" / file)
    with tarfile.open(build("sdist", folder / "tree")) as archive:
        names = archive.getnames()
        archive.extractall(folder, filter="data")
    (top,) = {name.split("/")[0] for name in names}
    wheel = build("wheel", folder / top)
    return {name.removeprefix(f"{top}/") for name in names}, set(zipfile.ZipFile(wheel).namelist())


def test_sdist_has_all_that_the_tests_need(built):
    """The package, its tests, what these import and what they read."""
    expected = set().union(*map(files_of, SOURCES))
    assert len(expected) > 300
    assert not expected - built[0]


def test_wheel_of_the_sdist_has_the_package_alone(built):
    """Every module and every file of data, and nothing else but metadata."""
    inside = {name for name in built[1] if ".dist-info/" not in name}
    assert inside == files_of("str_kernels")
    assert {"str_kernels/py.typed"} < {name for name in inside if not name.endswith(".py")}
    assert any(name.startswith("str_kernels/demo/") and name.endswith(".json") for name in inside)


def test_the_installed_package_is_what_is_tested():
    """After `pip install .` the tree's own modules are not imported, by a child neither."""
    try:
        found = distribution("str-kernels")
    except PackageNotFoundError:
        pytest.skip("the package is not installed")
    source = json.loads(found.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        pytest.skip("the package is installed as editable")
    import str_kernels

    installed = str(found.locate_file("str_kernels/__init__.py"))
    code = "import str_kernels; print(str_kernels.__file__)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert os.path.samefile(str_kernels.__file__, installed), "run `pytest`, not `python -m pytest`"
    if sys.version_info >= (3, 11):  # PYTHONSAFEPATH is new there
        assert os.path.samefile(child.stdout.strip(), installed)


def test_ci_runs_the_oldest_versions_promised():
    """The floors of the metadata are what CI installs for the tests of the patch."""
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for name in ("transformers", "peft", "trl"):
        (floor,) = set(re.findall(rf'"{name}>=([\d.]+)', metadata))
        assert f'"{name}=={floor}.*"' in script


def test_the_citation_names_this_version():
    """`CITATION.cff` has the package's version and licence."""
    from str_kernels import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
