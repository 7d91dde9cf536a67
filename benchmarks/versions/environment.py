"""One environment: install the versions and the wheel, run the tests, and say what came of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.versions.plan import Versions
from str_kernels.bench.report import Row

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "trl", "triton", "accelerate")
# what meets the other packages; the numbers of the backends depend on torch alone
TESTS = (
    "tests/test_operator.py",
    "tests/test_functional.py",
    "tests/engine/test_products.py",
    "tests/huggingface/patch/test_patch.py",
    "tests/huggingface/constraint/test_constraint.py",
    "tests/huggingface/deferred/test_tensor.py",
    "tests/huggingface/test_peft.py",
    "tests/huggingface/test_trainer.py",
    "tests/integrations/test_callback.py",
)
# Triton reads TRITON_INTERPRET when it is imported, so these run in a process of their own;
# TRL 1.15's own head, with which the patched one is compared, is a Triton kernel on CPUs too
INTERPRETED = (
    "tests/triton/interpreted/test_combine.py",
    "tests/huggingface/test_trl.py",
    "tests/huggingface/test_trl_tokens.py",
)
_NOT_SOURCE = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", ".*")
_VERSIONS = (
    "import json, platform\n"
    "from str_kernels.version import versions\n"
    f"print(json.dumps({{'python': platform.python_version(), **versions(*{PACKAGES!r})}}))"
)


def build_wheel(folder: Path, *, floors: bool = True) -> Path:
    """Build the package's wheel from a copy, so that nothing of an earlier build gets into it.

    Without floors pip installs it beside anything: that is how versions below them are tried.
    """
    copy = shutil.copytree(ROOT, folder / "source", ignore=_NOT_SOURCE)
    if not floors:
        metadata = copy / "pyproject.toml"
        text = metadata.read_text(encoding="utf-8")
        metadata.write_text(re.sub(r'(?m)^(  "\w+)>=[\d.]+', r"\1", text), encoding="utf-8")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "-w", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, copy], check=True)
    return next(folder.glob("*.whl"))


def examine(asked: Versions, wheel: Path, folder: Path) -> Row:
    """Install into a new environment in ``folder``, run the tests there, and delete it."""
    began = time.monotonic()
    venv = folder / "venv"
    row: Row = {"asked": asdict(asked), "installed": None, "why": ""}
    try:
        row["why"] = _install(asked, wheel, venv)
        if not row["why"]:
            row["installed"] = json.loads(_run(venv, venv / "bin/python", "-c", _VERSIONS).stdout)
            row |= _test(venv, folder)
    finally:
        shutil.rmtree(venv, ignore_errors=True)
    return row | {"seconds": round(time.monotonic() - began)}


def _install(asked: Versions, wheel: Path, venv: Path) -> str:
    """Return why it could not be installed, or nothing."""
    python = shutil.which(f"python{asked.python}")
    if python is None:
        return f"no python{asked.python} on PATH"
    subprocess.run([python, "-m", "venv", venv], check=True)
    pins = [f"{name}=={version}.*" for name, version in asked.pins().items()]
    steps = [[*pins, f"str-kernels[test] @ {wheel.as_uri()}"]]
    if asked.triton is not None:
        steps.append(["--no-deps", f"triton=={asked.triton}.*"])
    for step in steps:
        done = _run(venv, *_installer(venv), *step)
        if done.returncode:
            return _reason(done.stderr)
    return ""


def _installer(venv: Path) -> list[str]:
    """Prefer uv, which keeps one copy of the gigabytes that environments share."""
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", str(venv / "bin" / "python")]
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    return [*pip, "install", "--quiet", "--no-compile"]


def _reason(errors: str) -> str:
    """What pip says in its lines of errors, or uv in all it says."""
    said = [line for line in errors.splitlines() if line.startswith("ERROR")]
    return _placeless(" ".join((" ".join(said) or errors).split()))[:500]


def _placeless(text: str) -> str:
    """Leave out where things lie on this machine and where packages come from: names remain."""
    return re.sub(r"(?:\w+://|(?<![\w.])/)[^\s'\"]*/", "…/", text)


def _test(venv: Path, folder: Path) -> Row:
    """Run the tests against the installed wheel; the tree gives them no module but their own."""
    found: Row = {"passed": 0, "skipped": 0, "failed": 0, "failures": {}}
    for number, (files, setting) in enumerate(
        ((TESTS, {}), (INTERPRETED, {"TRITON_INTERPRET": "1"}))
    ):
        report = folder / f"{number}.xml"
        report.unlink(missing_ok=True)
        options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
        ran = _run(venv, venv / "bin/pytest", *options, f"--junitxml={report}", *files, **setting)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        for case in ElementTree.parse(report).iter("testcase"):
            _count(found, case)
    return found


def _count(found: Row, case: ElementTree.Element) -> None:
    outcomes = {child.tag: child for child in case}
    wrong = outcomes.get("failure", outcomes.get("error"))
    if wrong is not None:
        found["failed"] += 1
        lines = [line[1:].strip() for line in (wrong.text or "").splitlines() if line[:1] == "E"]
        reason = lines[0] if lines else wrong.get("message", "")
        found["failures"][f"{case.get('classname')}::{case.get('name')}"] = _placeless(reason)[:300]
    else:
        found["skipped" if "skipped" in outcomes else "passed"] += 1


def _run(venv: Path, *command: object, **setting: str) -> subprocess.CompletedProcess:
    """Run a command in the root, the environment's programs first; what it prints is kept."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(venv / "bin"), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**kept, "PATH": path, **setting},
        capture_output=True,
        text=True,
    )
