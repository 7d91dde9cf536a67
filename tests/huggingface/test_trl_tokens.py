"""What the patch answers TRL of every token, beside the answers of TRL's own head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from str_kernels import SafetyConstraint
from str_kernels.huggingface import patch_model
from str_kernels.huggingface.trl import SumOnly
from tests.huggingface.models import batch, build

pytest.importorskip("trl", minversion="1.15")
utils = pytest.importorskip("trl.trainer.utils")
FIELDS = ("log_probs", "entropy", "is_top1")


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2", "mixtral"])
def test_every_token(name, shifted):
    """Log-probabilities, entropy, top-1 and mask of each token, and the gradient of their sum."""
    model, inputs = build(name).eval(), batch()
    inputs["labels"] = inputs["labels"].clone()
    with torch.no_grad():
        unlabelled = {name: x for name, x in inputs.items() if name != "labels"}
        best = model(**unlabelled).logits.argmax(-1)
    inputs["labels"][:, 4:7] = best[:, 3:6]
    if shifted:
        shifted_labels = functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        inputs["shift_labels"] = shifted_labels.contiguous()
    utils.add_fused_lm_head(model, outputs=FIELDS)
    found = []
    for patched in (False, True):
        if patched:
            patch_model(model)
        model.zero_grad()
        answer = model(**inputs, fused_lm_head=True)
        (answer.log_probs * torch.linspace(0.5, 2, answer.log_probs.shape[1])).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((answer, gradients))
    (want, slopes), (got, patched_slopes) = found
    assert type(got) is type(want)
    assert 0 < want.is_top1.sum() < want.label_mask.sum()
    assert got.is_top1.equal(want.is_top1)
    assert got.label_mask.equal(want.label_mask)
    # the entropy of a sure token is the difference of two numbers as large as its logits, up to 20
    for field, atol in {"log_probs": 2e-5, "entropy": 20 * 2**-18, "loss": 2e-5}.items():
        torch.testing.assert_close(got[field], want[field], rtol=2e-5, atol=atol)
    assert slopes.keys() == patched_slopes.keys()
    for parameter, slope in slopes.items():
        atol = 1e-5 * max(1.0, slope.abs().max().item())
        torch.testing.assert_close(patched_slopes[parameter], slope, rtol=1e-4, atol=atol)


def test_shifted_labels_alone_are_refused():
    """The model's own forward computes no loss of them, as TRL's would."""
    model, inputs = build(), batch()
    inputs["shift_labels"] = inputs.pop("labels")
    utils.add_fused_lm_head(model, outputs=FIELDS)
    patch_model(model)
    with pytest.raises(ValueError, match=r"shift_labels: .*needs labels beside them"):
        model(**inputs, fused_lm_head=True)


OTHERS = {
    "dpo": {"outputs": ("log_probs", "entropy", "mean_logits", "is_top1")},
    "kto": {"outputs": ("log_probs", "entropy", "mean_logits")},
    "grpo": {"outputs": ("log_probs", "entropy")},
    "temperature": {"outputs": FIELDS, "temperature": 0.7},
    "cast": {"outputs": FIELDS, "cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("first", ["patch", "trainer"])
@pytest.mark.parametrize("head", OTHERS.values(), ids=OTHERS)
def test_other_heads(head, first):
    """What other trainers ask for: TRL's own answer, which is said; with a constraint refused."""
    inputs, want = batch(), None
    for safety in (None, SafetyConstraint([3, 17], 1.0)):
        model = build()
        if first == "patch":
            patch_model(model, safety)
        utils.add_fused_lm_head(model, **head)
        if first == "trainer":
            want = model(**inputs, fused_lm_head=True) if safety is None else want
            patch_model(model, safety)
        model.train()
        if safety is None:
            with pytest.warns(UserWarning, match="computes its loss past it"):
                got = model(**inputs, fused_lm_head=True)
            assert want is None or got.log_probs.equal(want.log_probs)
            assert (got.mean_logits is None) == ("mean_logits" not in head["outputs"])
        else:
            with pytest.raises(ValueError, match="DPO, GRPO and KTO"):
                model(**inputs, fused_lm_head=True)


def test_only_sums():
    """The losses of a constrained model: negated and summed as plain ones, with their gradient."""
    plain = torch.arange(6.0).reshape(2, 3).requires_grad_()
    held = -SumOnly.of(plain * 2)
    assert type(held) is SumOnly
    assert held.shape == (2, 3)
    total = (-held).sum()
    assert type(total) is torch.Tensor
    total.backward()
    assert total == 30
    assert plain.grad.eq(2).all()
    for refused in (lambda: held.exp(), lambda: held * 2, lambda: held[:, 1:], lambda: held.mean()):
        with pytest.raises(ValueError, match="only their sum is a loss"):
            refused()
