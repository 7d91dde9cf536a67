"""A patched model is copied with a patch of its own, and refuses to be pickled."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from str_kernels import SafetyConstraint
from str_kernels.huggingface import DeferredLogits, patch_model, unpatch_model
from str_kernels.huggingface.deferred.forward import is_installed
from str_kernels.huggingface.patch.install import find_patch
from tests.huggingface.models import batch as small_batch
from tests.huggingface.models import build
from tests.huggingface.patch.test_filtering import batch, model_of, used_index
from tests.huggingface.trainers import SAFETY, lora_model

PICKLES = {
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "pickle": pickle.dumps,
    "inner": lambda model: pickle.dumps(model.get_base_model()),
    "head": lambda model: pickle.dumps(model.get_output_embeddings()),
    "patch": lambda model: pickle.dumps(find_patch(model)),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickling_is_refused(name):
    """With what to do instead; the model goes on, and does as advised."""
    model, inputs = lora_model(), small_batch()
    patch = patch_model(model, SAFETY)
    want = model(**inputs).loss
    with pytest.raises(pickle.PicklingError, match=r"save_pretrained.*state_dict.*unpatch_model"):
        PICKLES[name](model)
    assert torch.equal(model(**inputs).loss, want)
    state = patch.state_dict()
    unpatch_model(model)
    loaded = pickle.loads(pickle.dumps(model))
    plain = model(**inputs).loss
    assert torch.equal(loaded(**inputs).loss, plain)
    with patch_model(loaded, SAFETY) as patch:
        patch.load_state_dict(state)
        assert torch.equal(loaded(**inputs).loss, want)


def test_a_process_of_its_own():
    """``spawn`` refuses in the parent, before a child has begun."""
    model = build()
    with patch_model(model):
        child = multiprocessing.get_context("spawn").Process(target=print, args=(model,))
        with pytest.raises(pickle.PicklingError, match="patched model cannot be pickled"):
            child.start()


def test_a_wrapper_that_came_later_does_not_matter():
    """Below accelerate's forward an unpatched model can be pickled, and the copy patched."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model, inputs = build(), small_batch()
    want = model(**inputs).loss
    patch_model(model)
    wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    with pytest.raises(pickle.PicklingError, match="patched model cannot be pickled"):
        pickle.dumps(wrapped)
    twin = copy.deepcopy(wrapped)
    unpatch_model(model)
    assert find_patch(twin).installed
    assert is_installed(twin)
    assert isinstance(twin(**inputs).logits, DeferredLogits)
    loaded = pickle.loads(pickle.dumps(model))
    assert not is_installed(loaded)
    with patch_model(loaded) as patch:
        assert patch.verification.fused
        assert torch.allclose(loaded(**inputs).loss, want, rtol=1e-5)
    patch_model(model)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def test_an_average_of_the_weights():
    """The copy that torch averages into: trains and evaluates as a patched model of its own."""
    model, inputs = lora_model(), small_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    patch = patch_model(model, SAFETY)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    got = average(**inputs)
    twin = find_patch(average.module)
    assert twin is not patch
    assert twin.last_parts is not patch.last_parts
    assert isinstance(got.logits, DeferredLogits)
    assert not torch.equal(got.loss, model(**inputs).loss)
    unpatch_model(average.module)
    plain = average(**inputs).loss
    assert torch.allclose(plain + twin.last_parts.penalty, got.loss, rtol=1e-5)
    assert patch.installed


def test_a_copy_keeps_what_was_learned():
    """A teacher copied from a trained model evaluates with the index of the original, its own copy
    of it, and counts and logs for itself.
    """
    model = model_of()
    with patch_model(model, SafetyConstraint([1, 2], 1.0), check_accuracy_every=1) as patch:
        model(**batch()).loss.backward()
        teacher = copy.deepcopy(model)
        twin = find_patch(teacher)
        with torch.no_grad():
            want, got = model.eval()(**batch()).loss, teacher.eval()(**batch()).loss
        assert torch.equal(got, want)
        assert torch.equal(used_index(twin).order, used_index(patch).order)
        teacher.train()(**batch()).loss.backward()
        assert twin.guard._losses == 2
        assert patch.guard._losses == 1
        assert twin.state_dict()["meter"] != patch.state_dict()["meter"]
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(2.0)
        assert torch.equal(model(**batch()).loss, want)
    assert twin.installed
    assert not patch.installed
