"""Pictures: a method keeps its colour, the default is always drawn, and files stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.common import RESULTS
from benchmarks.safety import plots
from benchmarks.safety.findings import read
from benchmarks.safety.methods import HARSH, HARSHEST, ORDINARY, plan_order
from str_kernels.bench import style
from str_kernels.bench.contenders import CONTENDERS

LARGEST = 100_000  # bytes


@pytest.fixture(scope="module")
def findings():
    return read(RESULTS / "safety", plan_order())


def test_the_methods_of_a_picture_have_different_colours(findings):
    """Of the heads, and of every setting's methods; the default's is its own everywhere."""
    sets = [list(CONTENDERS)]
    sets += [[group.method for group in findings.of(s)] for s in findings.settings()]
    for names in sets:
        colours = [style.colour(name) for name in names]
        assert len(set(colours)) == len(colours), dict(zip(names, colours, strict=True))
    assert style.colour(style.DEFAULT) == style.colour("ours") == style.OURS
    assert "default" in style.named(style.DEFAULT)
    assert "default" in style.named("ours")


def test_the_default_is_drawn_in_every_setting(findings, tmp_path, monkeypatch):
    """In every `*-curves` and in the picture by learning rate, under its name."""
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    for setting in findings.settings():
        from benchmarks.safety.appendix import PLOTTED

        plots.curves(findings, setting, PLOTTED, tmp_path / "x.png")
    rates = tuple(s.name for s in (ORDINARY, HARSH, HARSHEST))
    plots.by_learning_rate(findings, rates, tmp_path / "x.png")
    for figure in drawn:
        (legend,) = figure.legends
        assert style.named(style.DEFAULT) in [text.get_text() for text in legend.get_texts()]


def test_the_committed_pictures_are_small():
    """A page with several of them is read at once."""
    found = sorted(RESULTS.rglob("*.png"))
    assert len(found) > 20
    assert [p.name for p in found if p.stat().st_size >= LARGEST] == []


def test_a_saved_picture_has_few_colours(tmp_path):
    """A palette, whose PNG is a fraction of the size."""
    from PIL import Image

    figure, (axis,) = style.new_figure()
    style.label(axis, "y", "ms", "lower")
    style.save(figure, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert axis.get_ylabel() == "ms   ↓ better"


@pytest.mark.slow
def test_every_picture_is_drawn_anew(tmp_path, monkeypatch):
    """All committed ones, by one command."""
    monkeypatch.setattr("sys.argv", ["pictures", "--out", str(tmp_path)])
    pictures.main()
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")}
    assert made == {p.relative_to(RESULTS) for p in RESULTS.rglob("*.png")}
    assert all((tmp_path / Path(name)).stat().st_size < LARGEST for name in made)
