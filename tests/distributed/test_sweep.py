"""Every kind, position and reference under every engine: right, or an error, and never wrong."""

from __future__ import annotations

from itertools import product

import pytest
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from str_kernels import patch_model
from str_kernels.huggingface import build_reference_cache
from tests.distributed import test_fsdp1
from tests.distributed.models import KINDS, Case, Found, assert_right, gradients, step
from tests.distributed.test_fsdp2 import shard

ENGINES = ("ddp", "fsdp1", "root", "alone", "norm", "tied")
# as in `models`, where small differences of large log-probabilities are multiplied as well
SEVERAL = 2e-5


def alone(case: Case, reference: str, **more: Tensor | None) -> Found:
    """One patched process with the whole batch, since a cache rounds its references."""
    model = case.model()
    patch_model(model, case.safety, positions=case.positions, reference=reference)
    batch = {name: x for name, x in {**case.batch(), **more}.items() if x is not None}
    items = (batch["labels"][:, 1:] != -100).sum()
    loss = model(**batch, num_items_in_batch=items).loss
    loss.backward()
    return Found(loss.item(), gradients(model))


def trained(case: Case, engine: str, reference: str) -> Found:
    model = case.model()
    patch_model(model, case.safety, positions=case.positions, reference=reference)
    if engine == "ddp":
        return step(case, DistributedDataParallel(model))
    if engine != "fsdp1":
        return step(case, shard(model, engine, reshard=True))
    policy = test_fsdp1.ModuleWrapPolicy({test_fsdp1.LlamaDecoderLayer})
    net = test_fsdp1.wrap(model, auto_wrap_policy=policy)
    found = step(case, net)
    with test_fsdp1.Fsdp1.summon_full_params(net, with_grads=True):
        found.gradients = gradients(net)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["adapter_off", "cache"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_wrong_value(ranks, engine, cached, tmp_path):
    for kind, positions, labels in product(
        KINDS[1:], ("all", "labels", 2), ((2, 5, 8, 10), (0, 0, 3, 9))
    ):
        case = Case(kind, tied=engine == "tied", positions=positions, labels=labels)
        reference, want = "adapter_off", None
        if cached:
            reference = str(tmp_path / f"{kind}{positions}{labels[0]}")
            tokens = {n: x for n, x in case.batch().items() if n != "labels"}
            build_reference_cache(case.model(), [tokens], reference, case.safety)
            want = alone(case, reference)
        found = ranks.run(trained, case, engine, reference)
        assert_right(found, want or case.truth(), gradient=SEVERAL)
