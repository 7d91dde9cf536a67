"""Indices kept between runs: found again, never stale, and nobody's way when they are broken."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from str_kernels.files import VARIABLE, cache_folder
from str_kernels.huggingface import patch_model
from str_kernels.huggingface.patch.filtering import watching_index
from str_kernels.huggingface.patch.index_cache import cached_index, fingerprint
from str_kernels.options import TILE
from str_kernels.vocabulary import VocabularyIndex, tile_means
from tests.huggingface.patch.test_filtering import batch, model_of, used_index

VOCAB, DIM = 5 * TILE + 7, 16


def head(vocab: int = VOCAB, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and some states."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, DIM, generator=g), torch.randn(40, DIM, generator=g)


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index was built."""
    built, real = [], VocabularyIndex.build

    def build(*args, **keywords):
        built.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr(VocabularyIndex, "build", build)
    return built


def only_file(folder):
    """The one file there; nothing half-written lies beside it."""
    (path,) = folder.iterdir()
    return path


def same(a: VocabularyIndex, b: VocabularyIndex) -> bool:
    """Bit for bit."""
    names = ("order", "mean_rows", "columns")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_found_again(tmp_path, builds, dtype):
    """Built once; the second time the same index is read, from a folder made on the way."""
    weight, states = (x.to(dtype) for x in head())
    folder = tmp_path / "a" / "b"
    first = cached_index(weight, states, folder)
    assert same(first, cached_index(weight.clone(), states.clone(), folder))
    assert len(builds) == 1


def test_a_file_of_an_earlier_version_gets_columns(tmp_path, builds):
    """It has no factors of the columns; they are computed from the same states."""
    want = cached_index(*head(), tmp_path)
    replace(want, columns=None).save(only_file(tmp_path))
    assert same(cached_index(*head(), tmp_path), want)
    assert len(builds) == 1


def test_other_heads_and_other_states_have_their_own(tmp_path, builds):
    """Another vocabulary, dtype, weight or batch is another file; a run never meets an earlier
    one's choices.
    """
    weight, states = head()
    others = [
        (weight, states),
        (head(VOCAB + 1)[0], states),
        (torch.cat([weight, weight[:TILE]]), states),
        (weight.bfloat16(), states),
        (head(seed=1)[0], states),
        (weight, states + 1),
    ]
    for case in others * 2:
        index = cached_index(*case, tmp_path)
        assert len(index.order) == len(case[0])
    assert len(builds) == len(list(tmp_path.iterdir())) == len(others)


@pytest.mark.parametrize("row", [3, VOCAB - 2])
def test_a_stale_index_is_never_used(tmp_path, builds, caplog, row):
    """One number of one row changed, a row that the digest does not see: built again, once."""
    weight, states = head()
    weight = weight.repeat(2, 1)
    before = fingerprint(weight, states)
    cached_index(weight, states, tmp_path)
    weight[row, 5] += 0.5
    assert fingerprint(weight, states) == before
    index = cached_index(weight, states, tmp_path)
    assert torch.equal(index.mean_rows, tile_means(weight, index.order))
    assert len(builds) == 2
    assert "mean rows are not this weight's" in caplog.text
    cached_index(weight, states, tmp_path)
    assert len(builds) == 2
    only_file(tmp_path)


@pytest.mark.parametrize("fault", ["empty", "text", "cut", "flipped", "mean", "size", "folder"])
def test_a_broken_file_is_put_right(tmp_path, builds, caplog, fault):
    """Whatever is in the file: one warning, a fresh index; the next run finds that one."""
    weight, states = head()
    want = cached_index(weight, states, tmp_path)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("hello")
    elif fault == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "flipped":  # every number of every tensor, the header left alone
        start = 8 + int.from_bytes(whole[:8], "little")
        path.write_bytes(whole[:start] + bytes(255 - b for b in whole[start:]))
    elif fault == "mean":
        replace(want, mean_rows=want.mean_rows.flip(0)).save(path)
    elif fault == "size":
        VocabularyIndex.build(head(VOCAB + 1)[0]).save(path)
    else:
        path.unlink()
        path.mkdir()
    builds.clear()
    with caplog.at_level(logging.WARNING):
        assert same(cached_index(weight, states, tmp_path), want)
    assert len(builds) == 1
    assert 1 <= len(caplog.records) <= (2 if fault == "folder" else 1)
    if fault != "folder":  # a folder in the place of the file cannot be replaced
        cached_index(weight, states, tmp_path)
        assert len(builds) == 1


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, caplog):
    """A full or read-only disk costs the cache, not the run; said once."""
    (tmp_path / "file").write_text("")
    weight, states = head()
    assert len(cached_index(weight, states, tmp_path / "file" / "x").order) == VOCAB
    assert [r.message[:34] for r in caplog.records] == ["the vocabulary index is not kept: "]


def test_writers_at_the_same_time(tmp_path):
    """Two processes write and read one file over and over; nobody ever meets half of one."""
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from str_kernels.vocabulary import VocabularyIndex\n"
        "torch.set_num_threads(1)\n"
        "path = Path(sys.argv[1]) / 'x.safetensors'\n"
        "index = VocabularyIndex.build(torch.arange(6000.0).view(-1, 2))\n"
        "for _ in range(20):\n"
        "    index.save(path)\n"
        "    assert len(VocabularyIndex.load(path).order) == 3000\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, env=os.environ) for _ in range(2)]
    assert [process.wait() for process in running] == [0] * 2
    only_file(tmp_path)


def test_where_indices_are_kept(monkeypatch, tmp_path):
    """The user's cache folder; another by name; none at all for ``off``."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "str_kernels" / "indices"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    for off in ("off", "OFF", "0", ""):
        monkeypatch.setenv(VARIABLE, off)
        assert cache_folder() is None


def losses() -> tuple[list[float], VocabularyIndex, list[tuple[int, int]]]:
    """Two steps of a patched model, the index they used, and the progress that was heard."""
    model, heard = model_of(), []
    with patch_model(model) as patch, watching_index(lambda *at: heard.append(at)):
        found = [model(**batch()).loss.item() for _ in range(2)]
        return found, used_index(patch), heard


def test_a_second_run_takes_the_first_ones_index(monkeypatch, tmp_path, builds):
    """The patched model keeps its index; a second run of the same losses builds none, and the
    progress of the first goes from 0 to V without a step back.
    """
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    first, index, heard = losses()
    assert [heard[0][0], heard[-1][0]] == [0, len(index.order)]
    assert heard == sorted(heard)
    assert len(heard) > 10
    second, again, silent = losses()
    assert second == first
    assert same(index, again)
    assert len(builds) == 1
    assert silent == []


def test_opting_out_leaves_no_file(monkeypatch, tmp_path, builds):
    """``off``: built in every run, nothing written, not even into the user's cache folder."""
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    losses()
    losses()
    assert len(builds) == 2
    assert list(tmp_path.iterdir()) == []
