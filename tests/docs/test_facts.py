"""What the pages say of the code and of the results is so."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml

from benchmarks import traffic
from str_kernels.integrations.axolotl import StrKernelsPlugin
from str_kernels.integrations.settings import PatchSettings
from str_kernels.safety.tokens import SafetyTokens
from tests.docs.reading import DOCS, blocks
from tests.tiny import word_tokenizer

ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks/results"


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def codes(text: str) -> set[str]:
    """What stands between backquotes."""
    return set(re.findall(r"`([^`\n]+)`", text))


def test_the_keys_of_the_logs_are_those_of_the_meter():
    """A table row for each average that a log may have, and no other."""
    from str_kernels.huggingface.patch.meter import LossMeter

    meter = LossMeter()
    meter.load_state_dict({"sums": [1.0] * 7, "drift": [1.0, 1.0]})
    logged = set(meter.take())
    table = page("logs").split("## What the patch logs")[1].split("\n\nFor one")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == logged


def test_what_train_prints_is_named():
    """The keys of a line of `str-kernels train`."""
    from str_kernels.cli.training_view import LOGGED

    sentence = page("logs").split("`str-kernels train` prints")[1].split("\n\n")[0]
    assert codes(sentence) == {"step", *LOGGED}


@pytest.fixture(scope="module")
def histories() -> dict[str, list[dict]]:
    """The histories of the safety runs, by setting and method."""
    found: dict[str, list[dict]] = {}
    for line in (RESULTS / "safety/runs.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
        row = json.loads(line)
        if row.get("history"):
            found.setdefault(row["name"].rpartition("--")[0], []).append(row["history"])
    return found


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("`kl` at 10, SST-2 at 0.0005", "sst2-ordinary--kl"),
        ("`kl` at 10, SST-2 at 0.002", "sst2-harsh--kl"),
        ("`kl` at 10, SST-2 at 0.003", "sst2-harshest--kl"),
        ("`kl` at 10, AG News at 0.002", "agnews-harsh--kl"),
        ("`kl` at 10, instructions at 0.002", "instructions-harsh--kl"),
        ("`mse` at 0.1, SST-2 at 0.002", "sst2-harsh--mse"),
        ("`mse` at 0.1, SST-2 at 0.003", "sst2-harshest--mse"),
        ("`logprob` at 0.1, SST-2 at 0.002", "sst2-harsh--logprob"),
        ("`logprob` at 0.1, SST-2 at 0.003", "sst2-harshest--logprob"),
    ],
)
def test_the_measured_ranges_are_those_of_the_runs(histories, row, name):
    """Medians of a run's last 20 steps, of all its steps for the gradient; smallest to largest."""
    (line,) = [x for x in page("logs").splitlines() if x.startswith(f"| {row} ")]
    cells = [cell.strip() for cell in line.split("|")[3:6]]
    columns = (("penalty", 20, 1), ("drift", 20, 0.5), ("gradient_norm", 0, 1))
    for cell, (key, steps, power) in zip(cells, columns, strict=True):
        values = [median(history[key][-steps:]) ** power for history in histories[name]]
        told = [float(number) for number in cell.split(" to ")]
        digits = len(cell.split(" to ")[0].partition(".")[2])
        assert told[0] == pytest.approx(min(values), abs=0.51 * 10**-digits)
        assert told[-1] == pytest.approx(max(values), abs=0.51 * 10**-digits)


def test_every_schema_of_a_file_is_documented():
    """Whoever changes a file's version says so."""
    text = page("files")
    modules = [p for p in (ROOT / "str_kernels").rglob("*.py") if "\nSCHEMA = " in p.read_text()]
    assert len(modules) > 8
    for path in modules:
        parts = path.relative_to(ROOT).with_suffix("").parts
        assert f"`{import_module('.'.join(parts)).SCHEMA}`" in text, path


def test_every_variable_of_the_environment_is_documented():
    """Those that the package names itself."""
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "str_kernels").rglob("*.py"))
    found = set(re.findall(r"\"(STR_KERNELS_[A-Z_]+)\"", code))
    assert len(found) >= 3
    assert found <= set(re.findall(r"STR_KERNELS_[A-Z_]+", page("install")))


def test_axolotls_file_is_read(tmp_path, monkeypatch):
    """Its plugin is the class, its section is taken, and no loss beside it is on."""
    (block,) = blocks(DOCS / "recipes.md", "yaml")
    config = yaml.safe_load(block.text)
    assert config["plugins"] == [f"{StrKernelsPlugin.__module__}.{StrKernelsPlugin.__name__}"]
    monkeypatch.chdir(tmp_path)
    SafetyTokens.from_strings(word_tokenizer(), ["sorry", "cannot"]).save("tokens.json")
    StrKernelsPlugin().pre_model_load(config)
    constraint = PatchSettings.from_config(config["str_kernels"]).read_constraint()
    assert (constraint.kind, constraint.strength) == ("kl", 10.0)


def test_the_settings_of_axolotls_section_are_named():
    """All of them, and no other."""
    sentence = page("recipes").split("The section takes")[1].split("\n\n")[0]
    assert codes(sentence) == set(PatchSettings.__dataclass_fields__)


def test_the_kinds_are_those_of_the_code():
    """`choosing.md` has a row for each, with its default strength."""
    from str_kernels.options import DEFAULT_STRENGTHS

    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]+\|[^|]+\| ([\d.]+) \|", page("choosing"), re.MULTILINE
    )
    assert {kind: float(strength) for kind, strength in rows} == DEFAULT_STRENGTHS


@pytest.mark.parametrize("name", ["benchmarks", "choosing", "paper", "how-it-works"])
def test_rows_that_are_copied_are_those_of_the_results(name):
    """A table of a page that names a file of results has that file's rows."""
    results = [p.read_text(encoding="utf-8") for p in RESULTS.rglob("*.md")]
    copied = re.findall(r"^\| (?:gemma|8,192|32,768) .*\|$", page(name), re.MULTILINE)
    assert all(any(row in text for text in results) for row in copied)
    assert copied or name != "benchmarks"


def test_the_bounds_hold():
    """`how-it-works.md`: the error of lse and of E, on random rows with a wrong screen."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 16, generator=generator, dtype=torch.float64)
    logits = weight @ torch.randn(16, generator=generator, dtype=torch.float64)
    mass = torch.softmax(logits, 0).reshape(4, 128)
    dead = torch.tensor([False, True, False, True])
    share = 0.1  # by which the screen is off
    m = mass[dead].sum()
    wrong = mass.sum() - share * m
    assert wrong.log().abs() <= -torch.log1p(-m * share) + 1e-12
    rows = weight.reshape(4, 128, 16)
    means = rows.mean(1)
    error = (mass.unsqueeze(-1) * rows).sum(1) - mass.sum(1, keepdim=True) * means
    radius = (rows - means.unsqueeze(1)).norm(dim=-1).amax(1)
    assert (error.norm(dim=-1) <= mass.sum(1) * radius).all()
    assert error[dead].sum(0).norm() <= m * radius.max()


def test_nothing_of_a_machine_is_in_the_pages():
    """No path of a developer, and no address of a registry."""
    for path in [*DOCS.glob("*.md"), ROOT / "CITATION.cff", ROOT / "mkdocs.yml"]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(
            r"(?<![\w.])/(?:tmp|home|opt|root|mnt|usr)/|localhost|pypi\.org/simple|file://", text
        )
        assert not found, (path, found)


def test_the_pages_name_files_that_exist():
    """Paths of the repository in the text."""
    for path in DOCS.glob("*.md"):
        for name in codes(path.read_text(encoding="utf-8")):
            if re.fullmatch(r"(str_kernels|benchmarks|tests|docs|\.ci)/[\w./-]+", name):
                assert Path(ROOT / name).exists(), (path.name, name)


def test_what_a_split_vocabulary_sends():
    """The page has the table that is computed."""
    assert traffic.table(traffic.Loss()) in page("distributed")
