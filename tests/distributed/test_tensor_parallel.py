"""A head that tensor parallelism has split is refused by name; a split body is nobody's concern."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from str_kernels import patch_model
from tests.distributed.models import Case

ADVICE = "leave lm_head out of the plan, or use DDP or FSDP2"


def by_transformers(case: Case, folder: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    patch_model(model)
    model(**case.share(torch.distributed.get_rank()))


def by_torch(case: Case) -> None:
    base = case.model().get_base_model()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(base.lm_head, mesh, ColwiseParallel())
    patch_model(base)


def test_transformers_plan(ranks, tmp_path):
    Case().model().unload().save_pretrained(tmp_path)
    for error in ranks.errors(by_transformers, Case("none"), str(tmp_path)):
        assert "ensor parallelism" in error
        assert ADVICE in error


def test_torch_s_plan(ranks):
    for error in ranks.errors(by_torch, Case("none")):
        assert "ensor parallelism" in error
        assert ADVICE in error
