"""The kernels leave the safety tokens out of their passes, and compute the kind ``kl_mass``."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.backends.triton import TritonBackend
from str_kernels.backends.triton.penalty import penalty_gradients, penalty_rows
from str_kernels.constraint import constraint_terms
from str_kernels.engine.contract import Kept, Statistics
from str_kernels.options import LossOptions
from tests.engine.test_rest import extreme_case, rest_case, upstream_of
from tests.oracle import assert_close

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.01, torch.float16: 0.005}
PLAIN = {"weighted": True, "static": True}
FULL = {"bias": True, "softcap": 4.0, "logit_scale": 1.3, "label_smoothing": 0.1, "z_loss": 0.01}
SMOOTH = {"label_smoothing": 0.1, "weighted": True}


def small(dtype, **options):
    """A case whose first label is a safety token."""
    case = rest_case(13, 16, vocab=150, dtype=dtype, **options)
    case.labels[0] = case.settings["safety"].token_ids[0]
    return case


@pytest.mark.parametrize(
    ("exact", "options", "dtype"),
    [
        ("triton", FULL, torch.float32),
        pytest.param("triton", PLAIN, torch.float16, marks=pytest.mark.slow),
        pytest.param("triton", SMOOTH, torch.float32, marks=pytest.mark.slow),
        pytest.param("blas", {"weighted": True}, torch.float32, marks=pytest.mark.slow),
        ("blas", PLAIN, torch.bfloat16),
    ],
    ids=str,
)
def test_the_exact_passes(exact, options, dtype):
    """Loss and gradients of all operands are the oracle's."""
    case = small(dtype, **options)
    upstream = upstream_of(case)
    got = case.run(upstream, backend=TritonBackend(exact=exact), filter_eps=0.0)
    assert_close(got, case.truth(upstream), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("options", "dtype"), [(FULL, torch.float32), (PLAIN, torch.bfloat16)], ids=str
)
def test_the_routed_passes(options, dtype, no_waits):
    """Screened, refined and put in their places without the host's knowledge."""
    case = small(dtype, **options)
    upstream = upstream_of(case)
    got = case.run(upstream, backend=TritonBackend(), filter_eps=1e-9)
    assert_close(got, case.truth(upstream), TOLERANCES[dtype])


@pytest.mark.slow
def test_an_8_bit_screen_of_an_index():
    """The safety tokens are left out of quantised products and hot tiles too."""
    case = rest_case(13, 32, vocab=700, dtype=torch.float32, k=20)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    got = case.run(backend=TritonBackend(), index=index, screen="int8", filter_eps=2.0**-9)
    assert_close(got, case.truth(), 0.03)


@pytest.mark.parametrize(
    "shift",
    [pytest.param(-12.0, marks=pytest.mark.slow), pytest.param(12.0, marks=pytest.mark.slow), 40.0],
)
def test_a_rest_of_nearly_nothing_or_nearly_all(shift):
    """No gradient loses its digits, though it is stored in 16 bits."""
    case = extreme_case(shift, torch.bfloat16, n=9, vocab=150)
    upstream = upstream_of(case)
    names = ("loss", "hidden_states")
    got, want = case.run(upstream, backend=TritonBackend()), case.truth(upstream)
    assert_close({n: got[n] for n in names}, {n: want[n] for n in names}, 0.01)


@pytest.mark.parametrize(
    ("count", "softcap", "extra"),
    [
        (1, None, {}),
        (70, 7.0, {}),
        (70, None, {"token_weights": [(1 + i) % 3 for i in range(70)], "temperature": 2.0}),
    ],
    ids=["one", "capped", "weighted"],
)
def test_the_kernel_of_the_constraint(count, softcap, extra):
    """Value and derivatives, of one token and of more than a program takes at once."""
    g = torch.Generator().manual_seed(0)
    safety = SafetyConstraint(range(count), 1.0, kind="kl_mass", **extra)
    options = LossOptions(safety=safety, logit_scale=0.7, softcap=softcap)
    z = torch.randn(19, count, generator=g)
    lse, rest = 3.0 + torch.rand(19, generator=g), torch.full((19,), 1e-4)
    reference = torch.randn(19, count + 1, generator=g).half()
    scale = torch.rand(19, generator=g)
    scale[3], z[3] = 0.0, float("nan")
    if softcap is None and count > 1:  # a token that cannot come
        z[5, 1] = reference[4:6, 1] = -torch.inf
    log_rest = -(torch.rand(19, generator=g) ** 4)
    none = torch.zeros(19)
    statistics = Statistics(lse, rest, none > 0, none, none, None, z, log_rest)
    log_p = (z.double() - lse.double()[:, None]) - rest.double()[:, None]
    values = torch.cat([log_p, log_rest.double()[:, None]], -1)
    want = constraint_terms(safety, values, reference)
    on = scale != 0
    value = penalty_rows(options, statistics, reference, scale)
    assert torch.allclose(value[on].double(), (scale * want.value)[on], rtol=1e-5, atol=1e-7)
    kept = Kept(*(None,) * len(Kept._fields))._replace(
        lse=lse, lse_rest=rest, safety_logits=z, reference=reference, log_rest=log_rest
    )
    got = penalty_gradients(options, kept, scale)
    slope = 0.7 * (1.0 if softcap is None else 1.0 - (z.double() / softcap) ** 2)
    beta = scale[:, None] * want.d_logits * slope
    assert torch.allclose(got.beta[on].double(), beta[on], rtol=1e-4, atol=1e-6)
    assert torch.allclose(got.d_lse[on].double(), (scale * want.d_lse)[on], rtol=1e-4, atol=1e-6)
    assert value[3] == got.d_lse[3] == 0
    assert not got.beta[3].any()
