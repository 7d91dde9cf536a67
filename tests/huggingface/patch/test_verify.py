"""The patch tries itself on the model at hand: what it finds, what it leaves, what it lets pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from str_kernels.huggingface import patch_model
from str_kernels.huggingface.deferred import head, recording, tensor
from str_kernels.huggingface.patch import comparison
from tests.huggingface.adapters import VARIANTS, wrap
from tests.huggingface.models import FP32, MODELS, batch, build, snapshot

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_warnings():
    """A sound model is patched in silence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="str_kernels")
        warnings.filterwarnings("error", message=".*patch.*")
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sound_models_pass(name, dtype):
    """Every quantity was compared; in half precision the loss and logits agree as in fp32."""
    with patch_model(build(name, dtype=dtype)) as patch:
        found = patch.verification
    assert (found.skipped, found.fused) == (None, True)
    assert found.errors.keys() >= {"loss", "gradient of the hidden states", "logits"}
    assert found.errors["loss"] < 10 * FP32  # absolute, of a loss of about 10
    assert found.errors["logits"] == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_pass(name):
    """PEFT's variations, and an adapter on the head is compared by its own gradients too."""
    with patch_model(wrap(build(dtype=torch.bfloat16), **VARIANTS[name])) as patch:
        found = patch.verification
    assert (found.skipped, found.fused) == (None, True)
    assert any("lora_B" in key for key in found.errors) == ("on the head" in name)


def _scale_missed(monkeypatch, model):
    monkeypatch.setattr(recording, "_times", lambda fold, other, divide: fold)


def _softcap_missed(monkeypatch, model):
    handler = recording.RECORDED[torch.tanh]
    monkeypatch.setitem(recording.RECORDED, torch.tanh, lambda fold, *_: fold)
    assert handler is not None


def _bias_dropped(monkeypatch, model):
    original = tensor.fold_linear

    def dropped(head, *given, **options):
        return original(head._replace(bias=None), *given, **options)

    monkeypatch.setattr(tensor, "fold_linear", dropped)


def _stale_weight(monkeypatch, model):
    old = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    monkeypatch.setattr(
        head, "_linear_arguments", lambda input, weight, bias=None: (input, old, bias)
    )


def _gradient_cut(monkeypatch, model):
    original = tensor.fold_linear

    def cut(head, *given, **options):
        hidden_states, weight = head.hidden_states.detach(), head.weight.clone()
        head = head._replace(hidden_states=hidden_states, weight=weight)
        return original(head, *given, **options)

    monkeypatch.setattr(tensor, "fold_linear", cut)


def _wrong_logits(monkeypatch, model):
    monkeypatch.setattr(tensor, "_replay_of", lambda func, args, kwargs: lambda: args[0] + 1)


def _an_error(monkeypatch, model):
    def broken(*_, **options):
        raise KeyError("planted")

    monkeypatch.setattr(tensor, "fold_linear", broken)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("cohere", _scale_missed, r"loss \S+ instead of"),
        ("gemma2", _scale_missed, r"loss \S+ instead of"),
        ("gemma2", _softcap_missed, r"loss \S+ instead of"),
        ("bias", _bias_dropped, r"loss \S+ instead of"),
        ("llama", _stale_weight, r"loss .*logits off by"),
        ("llama", _gradient_cut, "gradient of the hidden states off by 1 of its norm"),
        ("gemma2", _wrong_logits, "logits off by"),
        ("llama", _an_error, "KeyError: 'planted'"),
    ],
)
def test_planted_faults_are_refused(name, fault, message, dtype, monkeypatch):
    """A scale missed, a bias dropped, a stale weight...: refused by name, nothing left behind."""
    model = build("llama" if name == "bias" else name, dtype=dtype)
    if name == "bias":
        model.lm_head.bias = nn.Parameter(torch.randn(96, dtype=dtype) / 100)
    fault(monkeypatch, model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"ForCausalLM: tried on 16 tokens.*{message}"):
        patch_model(model)
    assert snapshot(model) == before
    with patch_model(model, verify=False) as patch:
        assert patch.verification is None


class Restless(LlamaForCausalLM):
    """Changes itself in every way that a forward can, and draws random numbers."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        self.seen = input_ids.shape
        self.short = nn.Linear(1, 1)
        self.counter.add_(1)
        self.moved = torch.ones(2)
        logits = self.lm_head(self.model(input_ids)[0] * torch.rand(()))
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def test_everything_is_as_it_was():
    """RNG, modes, hooks, buffers, gradients and what the forward did to the model."""
    model = build()
    model.__class__ = Restless
    model.register_buffer("counter", torch.zeros(()))
    model.register_buffer("moved", torch.zeros(2))
    model.lm_head.register_forward_hook(lambda *_: None)
    model.model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = snapshot(model), torch.get_rng_state()
    with patch_model(model) as patch:
        assert (patch.verification.skipped, patch.verification.fused) == (None, True)
        assert patch.last_parts is None
        assert patch.meter.take() == {}
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.counter
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


class Blind(LlamaForCausalLM):
    def forward(self, pixels, input_ids=None, labels=None):
        raise AssertionError("never reached")


def _on_meta(model):
    model.model.layers[0].to("meta")


def _sharded(model):
    model.model.norm.weight.ds_id = 3


def _blind(model):
    model.__class__ = Blind


def _not_finite(model):
    model.model.norm.weight.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_on_meta, "its weights are on the meta device"),
        (_sharded, "its weights are sharded"),
        (_blind, "TypeError: .*'pixels'"),
        (_not_finite, "its loss is not finite"),
    ],
)
def test_models_that_cannot_be_tried(change, reason):
    """Patched all the same, and the reason is said in one line."""
    model = build()
    change(model)
    with pytest.warns(UserWarning, match=f"was not tried on this model: {reason}") as said:
        patch = patch_model(model)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert patch.verification.skipped
    assert not patch.verification.fused


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_under_other_modes(around):
    """Patched where gradients are off, or under autocast, the trial is the same."""
    model = build()
    with patch_model(model) as patch:
        want = patch.verification
    with around(), torch.autocast("cpu", torch.bfloat16), patch_model(model) as patch:
        assert patch.verification == want


def test_the_first_training_step_is_the_same():
    """Tried or not, training draws the same numbers and gives the same loss."""
    losses = []
    for tried in (True, False):
        model = wrap(build("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
        model.base_model.model.transformer.drop.p = 0.3
        torch.manual_seed(3)
        with patch_model(model, verify=tried):
            losses.append(model(**batch()).loss)
    assert losses[0] == losses[1]


def test_a_model_prepared_for_mixed_precision():
    """A forward that accelerate wrapped in bf16 autocast: held to its casts, no false alarm."""
    from accelerate import Accelerator

    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(build())
    with patch_model(model) as patch:
        assert patch.verification.skipped is None
        assert patch.verification.fused


@pytest.mark.parametrize(("roundings", "passes"), [(0.5, True), (8.0, False)])
def test_a_dense_loss_may_err_as_a_plain_sum_over_the_vocabulary_does(roundings, passes):
    """Seen with 262,144 words on a CPU: the model's own fp32 loss was √V roundings off."""
    words, eps = 2**18, torch.finfo(torch.float32).eps
    logits = torch.randn(2, 8, 64)
    exact = comparison.Run(torch.tensor(21.0), logits, {}, 0.0)
    off = comparison.Run(exact.loss + roundings * eps * words**0.5, logits, {}, 0.0)
    assert (comparison.compare(off, exact, words)[1] == []) == passes


def test_a_loss_in_bf16_is_held_to_its_own_rounding():
    """The vocabulary's share of the tolerance is fp32's: a loss that is 0.5 off is a fault."""
    loss = torch.tensor(21.0, dtype=torch.bfloat16)
    exact = comparison.Run(loss, torch.randn(2, 8, 64), {}, 0.0)
    off = exact.loss + 0.5
    assert comparison.compare(comparison.Run(off, exact.logits, {}, 0.0), exact, 2**18)[1]
    rounded = comparison.Run(exact.loss + 0.125, exact.logits, {}, 0.0)  # the next number in bf16
    assert comparison.compare(rounded, exact, 2**18)[1] == []
