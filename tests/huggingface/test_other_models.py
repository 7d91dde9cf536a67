"""Models that do not do as transformers does today: sliced logits, own losses, odd heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from str_kernels import SafetyConstraint
from str_kernels.huggingface import patch_model
from tests.huggingface.dense import constant_cache, weights
from tests.huggingface.models import assert_same, batch, build, gradients, relative

REFERENCE = torch.tensor([0.5, -1.0, 2.0])
SAFETY = SafetyConstraint([3, 17, 40], 0.5, "mse")


class Own(LlamaForCausalLM):
    """Slices its logits as transformers did before 4.45; `way` says how it computes the loss."""

    way = "sliced"

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs
    ):
        hidden = self.model(input_ids, attention_mask, position_ids=position_ids)[0]
        if self.way == "flat head":
            hidden = hidden.flatten(0, 1)
        logits = self.lm_head(hidden)
        loss = None if labels is None else getattr(self, self.way.replace(" ", "_"))(logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)

    def sliced(self, logits, labels):
        shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return torch.nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), targets.view(-1))

    def words_second(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])

    def log_probabilities(self, logits, labels):
        return F.nll_loss(logits[:, :-1].flatten(0, 1).log_softmax(-1), labels[:, 1:].flatten())

    def labelled_only(self, logits, labels):
        keep = labels[:, 1:] != -100
        return F.cross_entropy(logits[:, :-1][keep], labels[:, 1:][keep])

    def flat_head(self, logits, labels):
        return F.cross_entropy(logits, F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())

    def twice(self, logits, labels):
        return self.sliced(logits, labels) + self.sliced(logits, labels)

    def by_hand(self, logits, labels):
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))
        return -(chosen[..., 0] * (labels[:, 1:] != -100)).sum()


def own(way: str) -> Own:
    model = build()
    model.__class__ = type("Own", (Own,), {"way": way})
    return model


WAYS = ["sliced", "words second", "log probabilities", "labelled only", "flat head"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("positions", ["labels", "all", 2])
def test_rows_find_their_positions(way, positions, tmp_path):
    """However the model arranges its rows, each is held to its own reference and weight."""
    model, inputs = own(way), batch()
    outputs = model(**inputs)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    logits = outputs.logits.reshape(*shifted.shape, -1)
    table, scored = weights(shifted, inputs["attention_mask"], positions), torch.ones_like(shifted)
    if way != "flat head" and positions == "all":
        scored[:, -1] = 0
    if way == "labelled only" and positions == "all":
        scored = (shifted != -100).long()  # nothing else reaches the loss
    if positions == "all":
        table = weights(shifted, inputs["attention_mask"] * scored, positions)
    drift = (logits[..., SAFETY.token_ids] - REFERENCE).square().mean(-1)
    count = (shifted != -100).sum()
    want = gradients(model, outputs.loss + SAFETY.strength * (table * drift).sum() / count)
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, REFERENCE)
    with patch_model(model, SAFETY, reference=cache, positions=positions):
        got = gradients(model, model(**inputs).loss)
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize(
    ("way", "message"),
    [("twice", "more than one cross-entropy"), ("by hand", "constraint took no part")],
)
def test_losses_that_the_constraint_cannot_join(way, message, tmp_path):
    """Refused with a constraint; without one, right."""
    model, inputs = own(way), batch()
    want = gradients(model, model(**inputs).loss)
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, REFERENCE)
    with patch_model(model, SAFETY, reference=cache), pytest.raises(ValueError, match=message):
        model(**inputs)
    with patch_model(model):
        assert_same(gradients(model, model(**inputs).loss), want)


@pytest.mark.parametrize("positions", ["labels", "all", 2])
def test_packed_rows_weigh_as_alone(positions, tmp_path):
    """Sequences packed into one row by position ids: both terms of the same sequences apart."""
    model, inputs = build(), batch()
    lengths = inputs["attention_mask"].sum(1).tolist()
    parts = [{k: x[i, :n] for k, x in inputs.items()} for i, n in enumerate(lengths)]
    packed = {k: torch.cat([part[k] for part in parts])[None] for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    packed["use_cache"] = False  # with a cache transformers does not see the packing
    items = sum(int((part["labels"] != -100).sum()) for part in parts)
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, REFERENCE, packed)
    with patch_model(model, SAFETY, reference=cache, positions=positions):
        alone = ({k: x[None] for k, x in part.items()} for part in parts)
        want = sum(model(**part, num_items_in_batch=items).loss for part in alone)
        got = model(**packed, num_items_in_batch=items).loss
    assert relative(got, want) < 1e-5


def test_a_compiled_model_keeps_its_constraint(tmp_path):
    """torch.compile of the whole model does not lose the penalty."""
    model, inputs = build(), batch()
    cache = constant_cache(tmp_path / "refs", inputs, SAFETY, REFERENCE)
    with patch_model(model, SAFETY, reference=cache):
        want = model(**inputs).loss
        assert torch.compile(model, backend="eager")(**inputs).loss == want
