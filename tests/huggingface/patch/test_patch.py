"""Putting the patch on and taking it off: what it refuses, what it leaves."""

from __future__ import annotations

import copy
import inspect
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from str_kernels import SafetyConstraint
from str_kernels.huggingface import DeferredLogits, Patch, patch_model, unpatch_model
from str_kernels.huggingface.deferred.freshness import StepClock
from str_kernels.huggingface.deferred.head import find_patch
from str_kernels.huggingface.patch import patch as patch_module
from tests.huggingface.models import (
    FP32,
    assert_same,
    batch,
    build,
    loss_and_gradients,
    relative,
    snapshot,
)

SAFETY = SafetyConstraint([3, 17], 0.5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
def test_unpatch_leaves_no_trace(wrapped):
    """Every attribute of every module is what it was, after training steps too."""
    model = build()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    patch_model(model, SAFETY if wrapped else None)
    assert snapshot(model) != before
    loss_and_gradients(model, **batch())
    unpatch_model(model)
    assert snapshot(model) == before
    assert type(model(**batch()).logits) is torch.Tensor


def test_the_hook_of_the_optimizers_goes_with_the_last_patch(monkeypatch):
    """Global to the process, it stays while another model is patched or unread logits are alive."""
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    monkeypatch.setattr(StepClock, "_alive", None)  # other tests' patches may still be alive
    before = dict(hooks)
    one, other = build(), build(seed=5)
    patch_model(one), patch_model(other)
    assert len(hooks) == len(before) + 1
    outputs = one(**batch())
    unpatch_model(one)
    unpatch_model(other)
    assert len(hooks) == len(before) + 1
    del outputs
    assert dict(hooks) == before


def test_the_head_is_looked_up_once(monkeypatch):
    """A training step asks whether the head was replaced, and examines one that was."""
    model, inputs = get_peft_model(build(), LoraConfig(target_modules=["q_proj"])), batch()
    seen, examine = [], patch_module.find_head
    monkeypatch.setattr(patch_module, "find_head", lambda m: seen.append(m) or examine(m))
    with patch_model(model, SAFETY) as patch:
        model(**inputs)
        assert seen == []
        patch.model.set_output_embeddings(copy.deepcopy(patch.model.get_output_embeddings()))
        model(**inputs)
        model(**inputs)
        assert seen == [patch.model]


def test_context_manager_gives_the_patch():
    """Leaving the block unpatches, an exception too; unpatching twice is an error."""
    model = build()
    with patch_model(model) as patch:
        assert isinstance(patch, Patch)
    with pytest.raises(KeyError), patch_model(model):
        raise KeyError
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_model(model)


def test_patching_twice():
    """One patch at a time, through PEFT's wrapper too."""
    model = build()
    patch_model(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM: is patched already"):
        patch_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": 3}, "reference=3: must be"),
        ({"reference": "static"}, r"a fixed reference tensor was removed in 0\.2"),
        ({"reference": torch.zeros(2)}, r"a fixed reference tensor was removed in 0\.2"),
        ({"reference": "nowhere.safetensors"}, "reference='nowhere.safetensors': no such file"),
        ({"positions": 0}, "positions=0: must be"),
        ({"positions": "prompt"}, "positions='prompt': must be"),
        ({"safety": SafetyConstraint([3, 96], 1.0)}, r"holds 96: the model's head has 96 rows"),
        ({"safety": None, "reference": "refs.safetensors"}, "without safety"),
        ({"filter_eps": 2.0}, "filter_eps=2.0"),
        ({"screen": "fp4"}, "screen='fp4'"),
        ({"backend": "cuda-magic"}, "cuda-magic"),
        ({"index": "best"}, "index='best'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    """Refused when patching, by name and value; nothing is installed."""
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, **{"safety": SAFETY, **arguments})
    assert snapshot(model) == before


def test_models_that_have_no_head():
    """A body, and a module that is no transformers model."""
    with pytest.raises(ValueError, match="LlamaModel: has no output head"):
        patch_model(build().model)
    with pytest.raises(ValueError, match="Linear: must be a transformers"):
        patch_model(nn.Linear(2, 2))


def _quantised(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(96, 32, dtype=torch.uint8), requires_grad=False)


def _meta(model):
    model.lm_head.to("meta")


def _subclass(model):
    class Quantised(torch.Tensor):
        pass

    model.lm_head.weight = nn.Parameter(torch.zeros(96, 32).as_subclass(Quantised))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_quantised, "no weight|quantised"),
        (_meta, "meta device"),
        (_subclass, "Quantised"),
    ],
)
def test_heads_that_cannot_be_fused(change, message):
    """Refused by name rather than computed wrongly."""
    model = build()
    change(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model)


def test_a_copy_is_a_patched_model_of_its_own():
    """deepcopy: the copy trains by its own weights, and unpatching one leaves the other."""
    model, inputs = build(), batch()
    patch_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    want = loss_and_gradients(model, **inputs)
    unpatch_model(model)
    got = loss_and_gradients(twin, **inputs)
    assert isinstance(twin(**inputs).logits, DeferredLogits)
    unpatch_model(twin)
    assert_same(loss_and_gradients(twin, **inputs), got)
    assert relative(got["loss"], want["loss"]) > 0.01


def test_saving_is_unchanged(tmp_path):
    """State dict and saved files are those of the unpatched model."""
    model = build()
    before = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    with patch_model(model):
        assert list(model.state_dict()) == before
        model.save_pretrained(tmp_path / "patched")
    names = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("plain", "patched")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "patched" / name
        ).read_bytes()


@pytest.fixture
def accelerator():
    """A bf16 accelerator; its state is global, so it is forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_signature_and_unwrapping(accelerator):
    """The signature stays, and accelerate's unwrap_model does not follow its way past the patch."""
    model, inputs = build(), batch()
    signature = inspect.signature(model.forward)
    with patch_model(model):
        assert inspect.signature(model.forward) == signature
        prepared = accelerator.prepare(model)
        assert isinstance(prepared(**inputs).logits, DeferredLogits)
        for keep in (True, False):
            unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
            assert isinstance(unwrapped(**inputs).logits, DeferredLogits)
    assert type(model(**inputs).logits) is torch.Tensor


def test_positional_labels():
    """Labels are seen wherever the model takes them from."""
    model, inputs = build(), batch()
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    with patch_model(model):
        assert isinstance(model(*given).logits, DeferredLogits)


def test_resized_embeddings_are_followed():
    """A head that was replaced after patching is the one that is used."""
    model, inputs = build(), batch()
    with patch_model(model):
        model.resize_token_embeddings(100, mean_resizing=False)
        got = loss_and_gradients(model, **inputs)
        assert model(**inputs).logits.shape[-1] == 100
    assert_same(got, loss_and_gradients(model, **inputs))


def test_compiled_whole_model():
    """``torch.compile(model)`` runs the patched forward eagerly: the same loss, still fused."""
    model, inputs = build(), batch()
    want = loss_and_gradients(model, **inputs)
    with patch_model(model):
        compiled = torch.compile(model, backend="eager")
        outputs = compiled(**inputs)
        assert relative(outputs.loss.detach(), want["loss"]) < FP32
        assert isinstance(outputs.logits, DeferredLogits)


def test_two_models_do_not_meddle():
    """A patch belongs to one instance: another model of the class keeps its logits."""
    one, other = build(), build(seed=5)
    with patch_model(one):
        assert type(other(**batch()).logits) is torch.Tensor


def test_a_cross_entropy_outside_the_forward_is_only_that():
    """A user's own loss of outputs.logits has no penalty, and says so."""
    model, inputs = get_peft_model(build(), LoraConfig(init_lora_weights=False)), batch()
    patch = patch_model(model, SAFETY)
    outputs = model(**inputs)
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    with pytest.warns(UserWarning, match="constraint is in outputs.loss"):
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())
    assert relative(loss, patch.last_parts.cross_entropy) < FP32
    assert not outputs.logits.is_materialised


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_the_logits_are_never_stored():
    """A training step with a constraint, forward, reference and backward, never holds [N, V]."""
    words, inputs = 60_000, batch(rows=4, length=64)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(init_lora_weights=False))
    with patch_model(model, SAFETY, index=None), _Largest() as largest:
        model(**inputs).loss.backward()
    assert words * 16 <= largest.elements < inputs["input_ids"].numel() * words / 2


def test_a_patch_says_what_it_does():
    """In one line: what it fused, what it holds and how, and whether it is still there."""
    model = build()
    with patch_model(model, SafetyConstraint([3, 17, 40], kind="kl"), positions=4) as patch:
        assert repr(patch) == (
            "Patch(LlamaForCausalLM: fused cross-entropy, holds 3 safety tokens by kl at 10, "
            "positions=4, reference=adapter_off; filter_eps=auto, screen=auto, index=auto, "
            "backend=auto)"
        )
    assert "removed, fused" in repr(patch)
    with patch_model(model, index=None) as patch:
        assert "no constraint; filter_eps=auto, screen=auto, index=None" in repr(patch)


def test_data_parallel_is_refused():
    """Its replicas would all call the first one's forward: refused, before and after the patch."""
    model = build()
    with pytest.raises(ValueError, match="model=DataParallel: is not supported"):
        patch_model(nn.DataParallel(model))
    with patch_model(model):
        with pytest.raises(ValueError, match="start one process a GPU"):
            model._replicate_for_data_parallel()
        with pytest.raises(ValueError, match="start one process a GPU"):
            model.lm_head._replicate_for_data_parallel()
    assert type(model._replicate_for_data_parallel()) is type(model)


def test_a_compiled_model_is_patched_inside():
    """One that was compiled before it is patched, where its wrapper is not the model."""
    model, inputs = build(), batch()
    want = model(**inputs).loss
    compiled = torch.compile(model, backend="eager")
    with patch_model(compiled) as patch:
        assert patch.model is model
        assert find_patch(compiled) is patch
        assert relative(compiled(**inputs).loss, want) < FP32
        assert patch.last_parts is not None


def test_what_was_reported_stays():
    """A change of the loss in place, as when a router's is added, is not in it."""
    model = build()
    with patch_model(model) as patch:
        loss = model(**batch()).loss
        want = loss.item()
        loss += 1.0
        assert patch.last_parts.cross_entropy.item() == want


@pytest.mark.parametrize("weighing", ["mean", "product"])
def test_losses_of_tokens_have_the_penalty_in_them(weighing):
    """A loss of one's own that leaves out or weighs tokens would do so with the penalty."""

    def own(logits, labels, vocab_size, **_):
        losses = F.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), reduction="none"
        )
        return losses.mean() if weighing == "mean" else (losses * 2.0).sum()

    def summed(logits, labels, vocab_size, by="none", **_):
        flat = logits[:, :-1].reshape(-1, vocab_size)
        return F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction=by).sum()

    model, inputs = get_peft_model(build(), LoraConfig(target_modules=["q_proj"])), batch()
    inner = model.get_base_model()
    inner.loss_function = own
    with patch_model(model, SAFETY, verify=False):
        with pytest.raises(ValueError, match="which contain the penalty; only their sum is a loss"):
            model(**inputs)
        inner.loss_function = summed
        got = model(**inputs).loss
        inner.loss_function = partial(summed, by="sum")
        assert torch.equal(got, model(**inputs).loss)
    inner.loss_function = own
    want = model(**inputs).loss
    with patch_model(model, verify=False):
        assert relative(model(**inputs).loss, want) < FP32


def test_a_forward_that_was_kept_outlives_the_patch():
    """It is the model's own again."""
    model, inputs = build(), batch()
    want = model(**inputs).loss
    with patch_model(model):
        kept = model.forward
    assert torch.equal(kept(**inputs).loss, want)
