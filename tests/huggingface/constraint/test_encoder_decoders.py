"""Encoder-decoders: the constraint is about the decoder's rows, their ids and their padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from str_kernels import SafetyConstraint
from str_kernels.huggingface import build_reference_cache, patch_model
from str_kernels.huggingface.constraint.anchors import AnchoredCollator
from tests.huggingface.dense import safety_values
from tests.huggingface.models import VOCAB, assert_same, gradients

pytestmark = pytest.mark.one_in(3)

SAFETY = SafetyConstraint([3, 17, 40, 95], 0.5, "mse")
_SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.3,
    "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
START = {"bart": 2, "t5": 0, "m2m100": 2}


def build(name: str):
    """A tiny model with an adapter that has moved in the encoder as in the decoder."""
    torch.manual_seed(0)
    model = {
        "bart": lambda: BartForConditionalGeneration(BartConfig(**_SEQ2SEQ)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
        "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**_SEQ2SEQ)),
    }[name]()
    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).train()


def batch(width: int = 7) -> dict[str, torch.Tensor]:
    """Sources of 9 and 5 tokens, and targets of 7 and 4, each padded on the right."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, width), generator=g)
    labels = torch.randint(3, VOCAB, (2, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 5:], ids[1, 5:], labels[1, 4:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shifted(labels: torch.Tensor, start: int) -> torch.Tensor:
    """The decoder's ids, one number at a time."""
    rows = [[start, *(max(word, 0) for word in row[:-1])] for row in labels.tolist()]
    return torch.tensor(rows)


def dense_loss(model, name: str, inputs, positions, reference=None) -> torch.Tensor:
    """Row by row: the penalty of the positions that the decoder has labels or a mask for."""
    labels = inputs["labels"]
    arguments = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    arguments["decoder_input_ids"] = inputs.get("decoder_input_ids", shifted(labels, START[name]))
    real = inputs.get("decoder_attention_mask")
    if real is not None:
        arguments["decoder_attention_mask"] = real
    logits = model(**arguments).logits
    with torch.no_grad(), model.disable_adapter():
        aligned = model(**arguments).logits
    drift = (safety_values(logits, SAFETY) - safety_values(aligned, SAFETY)).square().mean(-1)
    penalty = 0.0
    for row, row_labels in enumerate(labels):
        labelled = (row_labels != -100).nonzero()[:, 0]
        end = labelled.max().item() + 1
        chosen = torch.arange(end) if real is None else real[row].nonzero()[:, 0]
        if positions != "all":
            chosen = labelled if positions == "labels" else labelled[:positions]
        penalty = penalty + drift[row, chosen].mean() * len(labelled)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return (cross_entropy + SAFETY.strength * penalty) / (labels != -100).sum()


@pytest.mark.parametrize("name", START)
@pytest.mark.parametrize("width", [7, 9])  # as long as the targets, and longer
@pytest.mark.parametrize("positions", ["all", "labels", 2])
def test_rows_are_the_decoder_s(name, width, positions):
    """Loss and gradients, with labels alone."""
    model, inputs = build(name), batch(width)
    want = gradients(model, dense_loss(model, name, inputs, positions))
    with patch_model(model, SAFETY, positions=positions):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_decoder_s_own_ids_and_mask(name):
    """They are not those that the labels would make, and the mask decides what is padding."""
    model, inputs = build(name), batch(7)
    inputs["decoder_input_ids"] = shifted(inputs["labels"], START[name]).roll(1, 0)
    inputs["decoder_attention_mask"] = torch.tensor([[1] * 6 + [0], [1] * 7])
    want = gradients(model, dense_loss(model, name, inputs, "all"))
    with patch_model(model, SAFETY):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)
    inputs["decoder_attention_mask"] = torch.ones(2, 1, 7, 7)
    with patch_model(model, SAFETY), pytest.raises(ValueError, match="decoder_attention_mask="):
        model(**inputs)


@pytest.mark.parametrize("name", START)
@pytest.mark.parametrize("given", ["labels", "decoder_input_ids"])
def test_caches(name, given, tmp_path):
    """Found by what the encoder reads and what the decoder says: the loss of the pass itself."""
    model, inputs = build(name), batch(7)
    if given == "decoder_input_ids":
        inputs[given] = shifted(inputs["labels"], START[name])
    path = tmp_path / "references.safetensors"
    assert build_reference_cache(model, [inputs], path, SAFETY) == 2
    want = gradients(model, dense_loss(model, name, inputs, "all"))
    longer = {k: F.pad(x, (0, 2), value=-100 if k == "labels" else 0) for k, x in inputs.items()}
    with patch_model(model, SAFETY, reference=path):
        # fp16 references: 2^-11 of logits, in a squared difference
        assert_same(gradients(model, model(**inputs).loss), want, 2e-3)
        assert_same(gradients(model, model(**longer).loss), want, 2e-3)
        other = inputs["input_ids"].roll(1, 0), inputs["attention_mask"].roll(1, 0)
        with pytest.raises(ValueError, match=r"holds nothing for row 0"):
            model(**{**inputs, "input_ids": other[0], "attention_mask": other[1]})
        states = model.get_base_model().get_encoder()(inputs["input_ids"])
        with pytest.raises(ValueError, match="input_ids: a reference cache is looked up"):
            model(encoder_outputs=states, labels=inputs["labels"])
    with pytest.raises(ValueError, match="no decoder_input_ids, by which the cache"):
        build_reference_cache(model, [{"input_ids": inputs["input_ids"]}], path, SAFETY)


def test_states_of_an_encoder_have_no_reference():
    """They come from the encoder with its adapter: refused, with what to pass."""
    model, inputs = build("bart"), batch()
    states = model.get_base_model().get_encoder()(inputs["input_ids"])
    with (
        patch_model(model, SAFETY),
        pytest.raises(ValueError, match=r"encoder_outputs: .*_ids"),
    ):
        model(encoder_outputs=states, labels=inputs["labels"])


def test_weights_of_positions_need_the_decoder_s_ids():
    """Anchor rows have no labels, so the decoder's ids of such a row are unknown: refused."""
    model, inputs = build("t5"), batch(7)
    collator = AnchoredCollator(lambda _: dict(inputs), [{"input_ids": [5, 6, 7]}], pad_token_id=0)
    with patch_model(model, SAFETY):
        with pytest.raises(ValueError, match=r"position_weights: .*decoder_input_ids"):
            model(**collator([]))
        inputs["decoder_input_ids"] = shifted(inputs["labels"], START["t5"])
        inputs["position_weights"] = (inputs["labels"] != -100).float()
        got = gradients(model, model(**inputs).loss)
    del inputs["position_weights"]
    assert_same(got, gradients(model, dense_loss(model, "t5", inputs, "labels")), 2e-5)
