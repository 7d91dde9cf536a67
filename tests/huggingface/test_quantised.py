"""Bodies in 4 and 8 bits, of the libraries that are installed: trained end to end with STR.

The libraries are no dependency of ours; where one is missing, its tests are skipped and say so.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from str_kernels import patch_model
from str_kernels.huggingface.constraint.reference_pass import reference_fold
from str_kernels.huggingface.deferred.forward import inner_forward
from str_kernels.levers import LongContext
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.models import assert_same, batch, build, loss_and_gradients


def _nf4(**more):
    pytest.importorskip("bitsandbytes", reason="4 bits of bitsandbytes")
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **kind, **more
    )


def _int8(**more):
    pytest.importorskip("bitsandbytes", reason="8 bits of bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **more)


def _torchao8():
    ao = pytest.importorskip("torchao.quantization", reason="8 bits of torchao")
    return TorchAoConfig(ao.Int8WeightOnlyConfig())


def _torchao4():
    ao = pytest.importorskip("torchao.quantization", reason="4 bits of torchao")
    return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4))


FORMS = {"nf4": _nf4, "int8": _int8, "torchao int8": _torchao8, "torchao int4": _torchao4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("body")
    model = build("llama")
    model.save_pretrained(path)
    return path


def quantised(folder, config) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).train()


@pytest.mark.parametrize("form", FORMS)
def test_trained_end_to_end(form, folder):
    """The reference is the unadapted body to the bit, the first penalty 0, and the loss falls."""
    model, inputs = quantised(folder, FORMS[form]()), batch()
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter
    with torch.no_grad():
        bare = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    model = wrap(model, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
    inner, losses, penalties = model.get_base_model(), [], []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with patch_model(model, SAFETY) as patch:
        for _ in range(4):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            penalties.append(patch.last_parts.penalty.item())
        fold = reference_fold(inner, inner_forward(inner), inputs, adapters=True)
    logits = nn.functional.linear(fold.hidden_states, inner.lm_head.weight)
    assert torch.equal(logits.reshape(bare.shape), bare)
    assert penalties[0] == 0.0
    assert min(penalties[1:]) > 0.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("tile_all", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_with_levers(form, tile_all, folder):
    """Checkpoints on disk and tiles change a quantised body's step by bf16's rounding at most."""
    model, inputs = wrap(quantised(folder, FORMS[form]()), target_modules="all-linear"), batch()
    tiles = {"tile_tokens": 4, "tile_all": tile_all}
    levers = LongContext(gradient_checkpointing=True, offload="disk", **tiles)
    with patch_model(model, SAFETY, verify=False):
        want = loss_and_gradients(model, **inputs)
        with levers.apply(model) as applied:
            # a gradient is a sum of a few hundred terms, each off by 2^-8, mostly at random
            assert_same(loss_and_gradients(model, **inputs), want, 0.02)
    # with all: an MLP, four projections and two norms in each layer, and the last norm
    assert len(applied.tiled) == (2 * 7 + 1 if tile_all else 2)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_head_is_refused(form, folder):
    """By name, with what to do; a head that is left as it is needs nothing."""
    model = quantised(folder, FORMS[form](llm_int8_skip_modules=["none"]))
    assert type(model.lm_head) is not nn.Linear
    with pytest.raises(
        ValueError, match=r"keep the head unquantised \(for bitsandbytes: llm_int8_skip"
    ):
        patch_model(model, SAFETY)


def test_torchaos_head_is_refused(folder):
    """A head whose weight is a subclass of a tensor."""
    config = FORMS["torchao int8"]()
    model = quantised(folder, config)
    head = copy.deepcopy(model.lm_head)
    head.weight = nn.Parameter(
        torch.cat([model.model.layers[0].self_attn.q_proj.weight.dequantize()] * 3), False
    )
    from torchao.quantization import quantize_

    quantize_(head, config.quant_type)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match="keep the head unquantised"):
        patch_model(model, SAFETY)
