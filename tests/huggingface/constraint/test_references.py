"""References on disk: computed once, found by content, refused when they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from str_kernels import SafetyConstraint
from str_kernels.backends.torch import TorchBackend
from str_kernels.huggingface import build_reference_cache, patch_model
from str_kernels.huggingface.constraint.references import ReferenceCache
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import assert_same, batch, build, gradients, relative


def cached(tmp_path, model=None, safety=SAFETY, **arguments):
    path = tmp_path / "references.safetensors"
    inputs = batch(**arguments)
    count = build_reference_cache(model or build(), [inputs], path, safety)
    assert count == len(inputs["input_ids"])
    return path


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl_mass"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["before peft", "with adapters"])
def test_as_adapter_off(kind, wrapped, tmp_path):
    """Built on the aligned model, or on the one with adapters: the loss of the dense reference."""
    model, inputs = wrap(build()), batch()
    safety = SafetyConstraint(SAFETY.token_ids, 0.5, kind=kind)
    path = cached(tmp_path, model if wrapped else build(), safety)
    want = gradients(model, dense_loss(model, inputs, safety, "all"))
    with patch_model(model, safety, reference=path):
        # fp16 references: 2^-11 of logits of about 8, in a squared difference of about 1
        assert_same(gradients(model, model(**inputs).loss), want, 2e-3)


def test_padding_does_not_matter(tmp_path):
    """A sequence is found by its tokens, on whichever side and however far it is padded."""
    path = cached(tmp_path, rows=3, length=11)
    inputs, cache = batch(), ReferenceCache(path, SAFETY)
    want = cache.lookup(inputs["input_ids"], inputs["attention_mask"])
    pad = torch.nn.functional.pad
    for sides in ((4, 0), (0, 4)):
        ids, mask = (pad(inputs[name], sides) for name in ("input_ids", "attention_mask"))
        got = cache.lookup(ids, mask)
        assert torch.equal(got[mask == 1], want[inputs["attention_mask"] == 1])
        assert not got[mask == 0].any()


def test_what_is_not_there(tmp_path):
    """Another sequence, other tokens, another unit: named, with what to do."""
    path = cached(tmp_path)
    with patch_model(build(), SAFETY, reference=path) as patch:
        with pytest.raises(ValueError, match=r"holds nothing for row 0 .*\(11 tokens\)"):
            patch.model(**batch(seed=9))
        embedded = patch.model.get_input_embeddings()(batch()["input_ids"])
        with pytest.raises(ValueError, match="input_ids: a reference cache is looked up"):
            patch.model(inputs_embeds=embedded, labels=batch()["labels"])
    for safety, message in (
        (SafetyConstraint([1, 2], 1.0), "other safety tokens"),
        (SafetyConstraint(SAFETY.token_ids, 1.0, kind="logprob"), "holds logits"),
        (
            SafetyConstraint(SAFETY.token_ids, 1.0, kind="kl_mass"),
            "holds logits, .* needs logprobs and rest; compute it again",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            patch_model(build(), safety, reference=path)


def test_files_that_are_no_cache(tmp_path):
    """A missing file, another safetensors file, another file."""
    other, junk = tmp_path / "other.safetensors", tmp_path / "junk"
    save_file({"x": torch.zeros(1)}, other)
    junk.write_text("no tensors here")
    for path, message in (
        (tmp_path / "none", "no such file"),
        (other, "schema is None"),
        (junk, "not a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceCache(path, SAFETY)


def test_building_refuses_before_it_computes(tmp_path):
    """No folder, nothing to store, batches without token ids."""
    for path in (tmp_path / "no" / "file", tmp_path):
        with pytest.raises(ValueError, match="must be a file in a folder"):
            build_reference_cache(build(), [batch()], path, SAFETY)
    with pytest.raises(ValueError, match="there was no sequence"):
        build_reference_cache(build(), [], tmp_path / "empty", SAFETY)
    with pytest.raises(ValueError, match="no input_ids"):
        build_reference_cache(build(), [{}], tmp_path / "none", SAFETY)
    assert list(tmp_path.iterdir()) == []


def test_building_leaves_the_model_as_it_was(tmp_path):
    """Mode, patch and adapters are put back; a patched model keeps its patch."""
    model = wrap(build())
    cached(tmp_path, model)
    assert model.training
    assert type(model(**batch()).logits) is torch.Tensor
    with patch_model(model, SAFETY) as patch:
        cached(tmp_path, model)
        assert model(**batch()).loss.requires_grad
        assert patch.last_parts.penalty > 0


def test_a_model_with_a_cache_can_be_copied(tmp_path):
    """Copies of a patched model share the open file."""
    path = cached(tmp_path)
    with patch_model(build(), SAFETY, reference=path) as patch:
        twin = copy.deepcopy(patch.model)
        assert twin(**batch()).loss == patch.model(**batch()).loss


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_reference_pass_reads_its_columns_alone(kind):
    """The training loss reads the vocabulary once, the reference never."""

    class Counting(TorchBackend):
        calls = 0

        def exact(self, *arguments):
            self.calls += 1
            return super().exact(*arguments)

    backend, model = Counting(), wrap(build())
    safety = SafetyConstraint(SAFETY.token_ids, 0.5, kind=kind)
    with patch_model(model, safety, backend=backend, verify=False):
        model(**batch()).loss.backward()
    assert backend.calls == 1


def test_packed_rows_are_told_apart_as_in_training(tmp_path):
    """On a model as it was loaded, with its cache on: training rows know sequences by positions."""
    model, path = wrap(build()), tmp_path / "references.safetensors"
    ids = batch(rows=3, length=24)["input_ids"]
    positions = torch.tensor([[*range(n), *range(24 - n)] for n in (7, 12, 20)])
    packed = {"input_ids": ids, "position_ids": positions}
    assert model.config.use_cache
    build_reference_cache(model, [packed], path, SAFETY)
    with model.disable_adapter(), torch.no_grad():
        logits = model(**packed, use_cache=False).logits[..., list(SAFETY.token_ids)]
        mixed = model(**packed, use_cache=True).logits[..., list(SAFETY.token_ids)]
    found = ReferenceCache(path, SAFETY).lookup(ids, torch.ones_like(ids))
    assert relative(found, logits) < 1e-3  # fp16
    assert relative(mixed, logits) > 5e-3
