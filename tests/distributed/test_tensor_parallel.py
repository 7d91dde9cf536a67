"""A head that tensor parallelism has split by rows: its loss is fused, and no logit is gathered."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from str_kernels import patch_model
from tests.distributed.models import KINDS, Case, Found, assert_right, gradients

HEADS = {"gathered": "colwise_gather_output", "split": "colwise"}


def whole_batch(case: Case) -> dict:
    """Processes that share a model have the same batch."""
    return {**case.batch(), "num_items_in_batch": torch.tensor(case.items)}


def stepped(case: Case, model, bare=None) -> Found:
    """One forward and backward; the loss is not multiplied by the number of processes."""
    loss = model(**whole_batch(case)).loss
    loss.backward()
    return Found(loss.item(), gradients(bare or model))


def split_head(case: Case, output: str = "gathered", **settings) -> Found:
    """The adapters of a body that is whole, and a head that torch's own plan has split."""
    model = case.model()
    base = model.get_base_model()
    layout = {} if output == "gathered" else {"use_local_output": False}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(base.lm_head, mesh, ColwiseParallel(**layout))
    base.lm_head.weight.requires_grad_(case.trained_head)
    positions = case.positions if case.safety else "all"
    patch_model(model, case.safety, positions=positions, **settings)
    return stepped(case, model)


def by_plan(case: Case, folder: str, output: str) -> Found:
    """A model that transformers has loaded in parts, all of whose parameters are trained."""
    plan = {**LlamaForCausalLM.config_class.base_model_tp_plan, "lm_head": HEADS[output]}
    plan = {name if name == "lm_head" else f"model.{name}": style for name, style in plan.items()}
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan=plan if output == "split" else "auto")
    patch_model(model.train())
    return stepped(case, model)


@pytest.fixture
def saved(tmp_path):
    def save(case: Case) -> Found:
        model = case.model().unload()
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path).train()
        loss = model(**whole_batch(case)).loss
        loss.backward()
        return Found(loss.item(), gradients(model))

    return save


@pytest.mark.parametrize("output", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_plan(ranks, saved, tmp_path, tied, output):
    case = Case("none", tied=tied, vocab=97)
    want = saved(case)
    assert_right(ranks.run(by_plan, case, str(tmp_path), output), want)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_s_plan(ranks, kind):
    case = Case(kind, trained_head=kind == "none", vocab=97)
    assert_right(ranks.run(split_head, case), case.truth())
