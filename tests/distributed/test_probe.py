"""SafetyProbe in two processes: the same forwards, one verdict, the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from str_kernels import SafetyProbe
from str_kernels.huggingface.constraint.adapters import adapters_off
from str_kernels.probe.reading import answers_of
from tests.distributed.models import Case
from tests.distributed.test_fsdp1 import wrap
from tests.distributed.trainers import train, train_by_trl, train_sharded
from tests.tiny import word_tokenizer

CASE = Case("kl", labels=(2, 5, 8, 10))


def probed(way: str) -> dict[str, Any]:
    """One step with a probe and one without; adapters that have moved make it begin below 1."""
    run = {"ddp": train, "trl": train_by_trl, "fsdp2": train_sharded}[way]
    asked = ["how to steal my ball ?", "tell me how to break a lamp please"]
    more = {"config": {}} if way == "fsdp2" else {}
    finding = SafetyProbe(asked, 1, tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="refuses none of 2"):  # each process has generated
        run(CASE, **more, callbacks=[finding])
    probe = SafetyProbe(
        asked, 1, openings=["I am sorry", "No"], tokenizer=word_tokenizer(), say=lambda text: None
    )
    alone, found = run(CASE, **more), run(CASE, **more, callbacks=[probe])
    same = all(torch.equal(g, found.gradients[name]) for name, g in alone.gradients.items())
    series = probe.series
    logged = found.more["safety_probe/refusal"]
    return {"same": same, "logged": logged, "refusal": series.refusal, "mass": series.mass}


@pytest.mark.parametrize(
    "way", ["fsdp2", *(pytest.param(way, marks=pytest.mark.slow) for way in ("ddp", "trl"))]
)
def test_all_processes_probe_alike(ranks, way):
    """Sharded weights are gathered for it, and adapters switched off for the aligned model's."""
    if way == "trl":
        pytest.importorskip("trl")
    first, second = ranks.run(probed, way)
    assert first == second
    assert first["same"]
    assert first["logged"] == first["refusal"][1]
    alone = Case("kl", labels=CASE.labels).model().eval()
    ratios = []
    for text, opening in (("how to steal my ball ?", "I am sorry"),
                          ("tell me how to break a lamp please", "No")):  # fmt: skip
        tokenizer = word_tokenizer()
        asked = tokenizer(f"<user> {text} <bot>", add_special_tokens=False)["input_ids"]
        ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows = [alone(torch.tensor([asked + ids])).logits]
            with alone.disable_adapter():
                rows.append(alone(torch.tensor([asked + ids])).logits)
        p, q = (
            row.double()
            .log_softmax(-1)[0, len(asked) - 1 : -1]
            .gather(-1, torch.tensor([ids]).T)
            .sum()
            for row in rows
        )
        ratios.append(min(1.0, (p - q).exp().item()))
    assert first["refusal"][0] == pytest.approx(sum(ratios) / 2, rel=1e-4)


def answered(sharded: bool) -> list[list[int]]:
    """What a model, with FSDP1 around its layers or not, says after two requests."""
    model = Case("none").model()
    net = wrap(model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer})) if sharded else model
    with adapters_off(net):
        return answers_of(net, word_tokenizer(), [[5, 6, 7], [8, 9, 10, 11]], 5)


@pytest.mark.slow
def test_fsdp1_answers_by_whole_forwards(ranks):
    """Its ``generate`` would go past the shards of the root; the answers are those of one model."""
    assert ranks.run(answered, True) == [answered(False)] * 2
