"""A cache that fills itself: each row is computed once, read back from then on, whole or absent."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
import torch

from str_kernels import SafetyConstraint
from str_kernels.huggingface import build_reference_cache, patch_model
from str_kernels.huggingface.constraint import filling
from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.tensor_rows import TensorRows
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.models import assert_same, batch, build, loss_and_gradients


@pytest.fixture
def passes(monkeypatch):
    """The batches of which references were computed."""
    seen, compute = [], filling.references_of

    def counted(model, arguments, safety):
        seen.append(arguments["input_ids"])
        return compute(model, arguments, safety)

    monkeypatch.setattr(filling, "references_of", counted)
    return seen


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl_mass"])
def test_it_holds_what_a_cache_made_before_holds(kind, tmp_path, passes):
    """Losses, gradients and references of both are the same bits, in every epoch and mode."""
    safety = SafetyConstraint(SAFETY.token_ids, 0.5, kind=kind)
    model, inputs, other = wrap(build()), batch(), batch(seed=5)
    made = tmp_path / "made.safetensors"
    build_reference_cache(model, [inputs, other], made, safety)
    with patch_model(model, safety, reference=made):
        want = [loss_and_gradients(model, **x) for x in (inputs, other)]
    cache = FillingCache(tmp_path / "filled.sqlite", safety)
    with patch_model(model, safety, reference=cache):
        for _ in range(2):
            for x, wanted in zip((inputs, other), want, strict=True):
                assert_same(loss_and_gradients(model, **x), wanted, 0.0)
        model.eval()
        model(**batch(seed=9))  # a row of an evaluation
    assert len(passes) == 3
    read = ReferenceCache(cache.path, safety)
    ids = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(read.lookup(*ids), ReferenceCache(made, safety).lookup(*ids))
    with patch_model(model.train(), safety, reference=cache.path):
        assert_same(loss_and_gradients(model, **inputs), want[0], 0.0)


def test_a_row_is_computed_once(tmp_path, passes):
    """A batch with a row that is new computes; afterwards neither order nor company matters."""
    inputs, model = batch(), wrap(build())
    with patch_model(model, SAFETY, reference=FillingCache(tmp_path / "r", SAFETY)) as patch:
        for rows in ([0], [0, 1], [1, 0], [2], [2, 1, 0]):
            model(**{name: x[rows] for name, x in inputs.items()})
        assert [len(ids) for ids in passes] == [1, 2, 1]
        assert len(patch.reference._saved) == 3
    with patch_model(model, SAFETY, reference=FillingCache(tmp_path / "r", SAFETY)):
        model(**inputs)
    assert len(passes) == 3


def test_the_rest_is_kept_beside_the_tokens(tmp_path, passes):
    """For ``kl_mass`` a row sums to 1, drawn rows fill it too, and it is no cache of logprobs."""
    safety = SafetyConstraint(SAFETY.token_ids, 0.5, kind="kl_mass")
    inputs, model, path = batch(), wrap(build()), tmp_path / "r.sqlite"
    with patch_model(model, safety, reference=FillingCache(path, safety), share=0.5):
        for _ in range(16):
            model(**inputs)
    assert sum(map(len, passes)) == len(inputs["input_ids"])
    found = ReferenceCache(path, safety).lookup(inputs["input_ids"], inputs["attention_mask"])
    kept = found[inputs["attention_mask"].bool()].float()
    assert kept.shape[-1] == len(SAFETY.token_ids) + 1
    step = torch.finfo(torch.float16).eps * kept.abs().amax()  # of log-probabilities
    assert (kept.exp().sum(-1) - 1).abs().max() <= step
    for kind in ("logprob", "mse"):
        with pytest.raises(ValueError, match=f"holds logprobs and rest, but kind='{kind}'"):
            patch_model(
                model,
                SafetyConstraint(SAFETY.token_ids, kind=kind),
                reference=FillingCache(path, safety),
            )


def test_what_is_refused(tmp_path):
    """Other tokens, another unit, no adapter, no database, a bit that changed; each is named."""
    path = tmp_path / "r.sqlite"
    cache, model = FillingCache(path, SAFETY), wrap(build())
    with pytest.raises(ValueError, match="other safety tokens"):
        FillingCache(path, SafetyConstraint([1, 2], 0.5))
    with pytest.raises(ValueError, match="holds logits, but kind='logprob'"):
        patch_model(model, SafetyConstraint(SAFETY.token_ids, kind="logprob"), reference=cache)
    with patch_model(model, SAFETY, reference=cache):
        model(**batch())
        (name,) = next(cache._saved._file.execute("SELECT name FROM tensors"))
    plain = build()
    with (
        patch_model(plain, SAFETY, reference=FillingCache(tmp_path / "p", SAFETY)),
        pytest.raises(ValueError, match="outside the adapters are trained"),
    ):
        plain(**batch())
    with sqlite3.connect(path) as file:
        file.execute("UPDATE tensors SET data = zeroblob(length(data)) WHERE name = ?", (name,))
    with pytest.raises(ValueError, match=f"{name} is not as it was written"):
        ReferenceCache(path, SAFETY).lookup(batch()["input_ids"], batch()["attention_mask"])
    (tmp_path / "text").write_text("no database at all, but long enough for a header of one")
    with pytest.raises(ValueError, match="cannot be read or made"):
        FillingCache(tmp_path / "text", SAFETY)
    with pytest.raises(ValueError, match="folder that can be written"):
        FillingCache(tmp_path / "no" / "folder", SAFETY)


KILLED = """
import os, sys, torch
from str_kernels.tensor_rows import TensorRows
rows = TensorRows(sys.argv[1], "rows", {})
rows.add({"whole": torch.ones(300, 64).half()})
rows._file.execute("PRAGMA cache_size = 1")  # pages reach the file before the end
rows._file.execute("BEGIN")
for name in ("a", "b", "c"):
    rows._file.execute("INSERT INTO tensors VALUES (?, '[300, 64]', 0, zeroblob(38400))", (name,))
os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    """What was added before is there, and what was being added is not; others may go on."""
    path = tmp_path / "r.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    rows, other = (TensorRows(path, "rows", {}) for _ in range(2))
    assert ["whole" in rows, "a" in rows, len(rows)] == [True, False, 1]
    assert torch.equal(rows["whole"], torch.ones(300, 64).half())
    other.add({"a": torch.zeros(0, 64).half(), "whole": torch.zeros(1, 64).half()})
    assert rows["a"].shape == (0, 64)
    assert rows["whole"].shape == (300, 64)  # what is there stays


MAKER = """
import os, sqlite3, sys
from str_kernels.tensor_rows import TensorRows
class Killed(sqlite3.Connection):
    def executemany(self, *given):
        super().executemany(*given)
        os.kill(os.getpid(), 9)
connect = sqlite3.connect
sqlite3.connect = lambda *given, **named: connect(*given, factory=Killed, **named)
TensorRows(sys.argv[1], "rows", {"schema": "some"})
"""


def test_a_killed_maker_leaves_no_half_of_a_file(tmp_path):
    """It has all its tables and what it says of itself, or nothing; the next run makes it."""
    path = tmp_path / "r.sqlite"
    done = subprocess.run([sys.executable, "-c", MAKER, path], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert sqlite3.connect(path).execute("SELECT name FROM sqlite_master").fetchall() == []
    with pytest.raises(ValueError, match=r"reference=.*r.sqlite"):
        ReferenceCache(path, SAFETY)
    assert FillingCache(path, SAFETY)._saved.metadata["schema"].startswith("str_kernels")


def test_a_full_disk_is_said(tmp_path):
    """An addition that does not fit is an OSError, with what to do."""
    rows = TensorRows(tmp_path / "r", "rows", {})
    rows._file.execute("PRAGMA max_page_count = 10")
    with pytest.raises(OSError, match=r"rows: cannot be written .* free some space"):
        rows.add({"a": torch.zeros(3000, 64).half()})
    assert "a" not in rows
