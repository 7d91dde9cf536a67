"""The kernels over a vocabulary that is split over two processes, each in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks import interpreter
from str_kernels import SafetyConstraint
from str_kernels.backends.triton import TritonBackend
from tests.distributed.pool import Pool
from tests.distributed.vocabulary import own, whole
from tests.oracle import Case, assert_close, make_case

pytestmark = pytest.mark.slow

ENDS, TOKENS = [0, 128, 180], [3, 40, 130, 131, 179]
SMOOTH = {"kind": "kl_mass", "label_smoothing": 0.1, "z_loss": 1e-2, "bias": True}


@pytest.fixture(scope="module")
def ranks():
    pool = Pool()
    yield pool
    pool.stop()


def interpreted(case: Case, exact: str, eps: float) -> dict[str, torch.Tensor]:
    interpreter.mend()
    part, shard = own(case, ENDS)
    return part.run(shard=shard, backend=TritonBackend(exact=exact), filter_eps=eps)


@pytest.mark.parametrize(("exact", "eps"), [("triton", 0.0), ("blas", 0.0), ("triton", 1e-9)])
@pytest.mark.parametrize("options", [{"kind": "kl"}, {"kind": "logprob"}, SMOOTH], ids=str)
def test_labels_and_safety_tokens_of_both(ranks, options, exact, eps):
    if exact == "blas" and "label_smoothing" in options:
        options = {"kind": "kl_mass", "weighted": True}
    case = make_case(9, ENDS[-1], 16, k=len(TOKENS), **options).to(torch.float32)
    case.settings["safety"] = SafetyConstraint(TOKENS, 0.7, kind=options["kind"])
    case.labels[:4] = torch.tensor([3, 131, 50, 140])
    got = whole(ranks.run(interpreted, case, exact, eps))
    assert_close(got, case.truth(filter_eps=0.0), 2e-6)
