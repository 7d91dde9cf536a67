"""The constraint's value and the backward of the hidden states, beside plain autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint, linear_cross_entropy
from str_kernels.backends.triton import TritonBackend
from str_kernels.engine.contract import Kept, Resolved, Statistics, Upstream
from str_kernels.engine.logits import kept_dtype
from str_kernels.engine.stages import TorchStages
from str_kernels.options import LossOptions
from tests.oracle import make_case, relative_error

ROWS, VOCAB, DIM = 37, 150, 75
KINDS = ["mse", "logprob", "kl"]


class Setting:
    """What the backward keeps, for random logits; rows of W are alike, as a model's are."""

    def __init__(self, kind, count=9, *, dtype=torch.float32, offset=0.0, weights=False, **options):
        g = torch.Generator().manual_seed(count)

        def random(*shape):
            return torch.randn(*shape, generator=g)

        ids = torch.randperm(max(VOCAB, count + 10), generator=g)[:count].tolist()
        omega = None
        if weights:
            omega = (random(count).abs() * (torch.arange(count) % 3 > 0)).tolist()
        extra = {"temperature": options.pop("temperature")} if "temperature" in options else {}
        safety = SafetyConstraint(ids, 0.7, kind=kind, token_weights=omega, **extra)
        self.options, self.dtype = LossOptions(safety=safety, **options), dtype
        cap = options.get("softcap")
        self.z = offset + 3 * random(ROWS, count)
        if cap:
            self.z = cap * torch.tanh(self.z / cap)
        self.lse = self.z.amax(-1) + random(ROWS).abs() + 1
        self.rest = 1e-7 * random(ROWS)
        self.reference = self.z + random(ROWS, count)
        if kind == "logprob":
            self.reference -= self.lse[:, None]
        self.weight = (3 * random(DIM) + random(max(VOCAB, count + 10), DIM)).to(dtype)
        self.scale = random(ROWS).abs() * (torch.arange(ROWS) % 4 > 0)
        self.g = g
        self.kept = Kept(
            labels=torch.zeros(ROWS, dtype=torch.int64),
            reference=self.reference,
            position_weights=None,
            weight=self.weight,
            hidden_states=None,
            bias=None,
            lse=self.lse,
            lse_rest=self.rest,
            safety_logits=self.z,
            rows=torch.arange(ROWS),
            safety_alone=torch.empty(0, dtype=torch.int64),
            safety_rows=self.weight[ids].to(dtype),
            ce_gradient=random(ROWS, DIM).to(kept_dtype(dtype)),
            lse_gradient=random(ROWS, DIM).to(kept_dtype(dtype)) if kind == "logprob" else None,
            open_mass=None,
        )
        self.upstream = Upstream(random(ROWS), self.scale * random(ROWS))

    def truth(self, scale):
        """``Σ scale · C`` in fp64, its parts, and derivatives by logits and lse, by autograd."""
        safety, cap = self.options.safety, self.options.softcap
        z, lse, r, scale = (x.double() for x in (self.z, self.lse, self.kept.reference, scale))
        z, lse = z.requires_grad_(), (lse + self.rest.double()).requires_grad_()
        omega = torch.tensor(safety.token_weights or [1.0] * z.shape[1]).double()
        if safety.kind == "kl":
            log_p, log_q = (
                torch.log_softmax(x / safety.temperature + omega.log(), -1)[:, omega > 0]
                for x in (z, r.expand_as(z))
            )
            value = safety.temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            distance = z - r - (lse[:, None] if safety.kind == "logprob" else 0.0)
            value = (omega * distance**2).mean(-1)
        value = scale * value
        d_z, d_lse = torch.autograd.grad(value.sum(), (z, lse), allow_unused=True)
        beta = self.options.logit_scale * d_z * (1.0 if cap is None else 1 - (z / cap) ** 2)
        return value.detach(), beta.detach(), d_lse

    def resolved(self, needs=(True, True, False)):
        return Resolved(None, self.options, needs, self.dtype)

    def check(self, tolerance=1e-5):
        """Value, β, d_lse and the gradient of hidden states; the kernels and torch's."""
        statistics = Statistics(self.lse, self.rest, None, None, None, None, self.z)
        value, _, _ = self.truth(self.scale)
        _, beta, d_lse = self.truth(self.upstream.penalty)
        kept, upstream = self.kept, self.upstream
        rows = kept.safety_rows.double()
        hidden = upstream.cross_entropy[:, None].double() * kept.ce_gradient.double() + beta @ rows
        if d_lse is not None:
            hidden = hidden + d_lse[:, None] * kept.lse_gradient.double()
        rounding = max(torch.finfo(self.dtype).eps, tolerance)
        close = {"rtol": rounding, "atol": rounding * (beta.abs() @ rows.abs()).max().item()}
        for stages in (TritonBackend(), TorchStages()):
            got = stages.penalty(self.options, statistics, kept.reference, self.scale)
            torch.testing.assert_close(got.double(), value, rtol=tolerance, atol=tolerance)
            found = stages.gradient(kept, upstream, self.resolved())
            torch.testing.assert_close(found.beta.double(), beta, rtol=tolerance, atol=tolerance)
            assert (found.d_lse is None) == (d_lse is None)
            if d_lse is not None:
                torch.testing.assert_close(
                    found.d_lse.double(), d_lse, rtol=tolerance, atol=10 * tolerance
                )
            assert found.hidden.dtype == self.dtype
            torch.testing.assert_close(found.hidden.double(), hidden, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 64, 65])
def test_every_kind(kind, count):
    """As many tokens as are taken at once, fewer and more."""
    Setting(kind, count).check()


@pytest.mark.parametrize("kind", ["mse", "logprob"])
def test_one_token(kind):
    """A divergence needs two."""
    Setting(kind, 1).check()


@pytest.mark.slow
def test_a_thousand_tokens():
    """As many as a constraint may have."""
    Setting("kl", 1024).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_of_16_bits(kind, dtype):
    """β keeps its digits beside rows of W that are alike."""
    Setting(kind, 9, dtype=dtype, temperature=2.0 if kind == "kl" else 1.0).check()


@pytest.mark.parametrize("kind", KINDS)
def test_token_weights_scale_and_softcap(kind):
    """A third of the weights is zero."""
    extra = {"temperature": 0.5} if kind == "kl" else {}
    Setting(kind, 70, weights=True, softcap=8.0, logit_scale=0.7, **extra).check(1e-4)


def test_a_large_common_offset():
    """What logits share leaves a divergence before anything is rounded."""
    Setting("kl", 9, offset=16384.0, temperature=3.0).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_reference_for_all_rows(dtype):
    """``[K]``, in a narrower dtype."""
    one = Setting("kl", 9)
    reference = one.reference[0].to(dtype)
    one.kept = one.kept._replace(reference=reference)
    one.check()


def test_gradients_beyond_the_range_of_fp16():
    """β of 1e6, as a loss scale makes it, and rows that cancel it."""
    one = Setting("kl", 9, dtype=torch.float16)
    one.upstream = one.upstream._replace(penalty=one.upstream.penalty * 1e6)
    tiny = torch.tensor(1e-4, dtype=torch.float16)
    one.kept = one.kept._replace(safety_rows=one.kept.safety_rows * tiny)
    rows = one.kept.safety_rows.double()
    found = TritonBackend().gradient(one.kept, one.upstream, one.resolved())
    want = found.beta.double() @ rows
    want += one.upstream.cross_entropy[:, None].double() * one.kept.ce_gradient.double()
    assert found.beta.abs().max() > 1e5
    torch.testing.assert_close(found.hidden.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_silent_rows(kind, bad):
    """Without an upstream gradient a row adds nothing, whatever it holds; with one it shows."""
    one = Setting(kind, 9)
    silent = torch.arange(ROWS) % 3 == 0
    off = torch.where(silent, 0.0, 1.0)
    penalty = torch.where(silent, 0.0, 1.0 + one.scale)
    one.upstream = Upstream(one.upstream.cross_entropy * off, penalty)
    for kept in (one.z, one.lse, one.kept.ce_gradient):
        kept[silent] = bad
    if kind == "logprob":
        one.kept.lse_gradient[silent] = bad
    found = TritonBackend().gradient(one.kept, one.upstream, one.resolved())
    assert not found.hidden[silent].any()
    assert not found.beta[silent].any()
    assert found.hidden[~silent].isfinite().all()
    one.z[1] = bad
    found = TritonBackend().gradient(one.kept, one.upstream, one.resolved())
    assert not found.hidden[1].isfinite().any()
    assert found.hidden[2].isfinite().all()
    statistics = Statistics(one.lse, one.rest, None, None, None, None, one.z)
    got = TritonBackend().penalty(one.options, statistics, one.reference, penalty)
    assert not got[silent].any()
    assert not got[1].isfinite()


@pytest.mark.parametrize("listed", [False, True])
def test_rows_of_a_list(listed):
    """A third of the rows has gradients, a third the constraint alone, and the rest nothing."""
    one, every = Setting("mse", 9), torch.arange(ROWS)
    rows, alone = every[every % 3 == 0], every[every % 3 == 1]
    dense = every % 3 == 0
    penalty = torch.where(every % 3 == 2, 0.0, one.upstream.penalty)
    gradients = one.kept.ce_gradient
    one.kept = one.kept._replace(rows=rows, safety_alone=alone, ce_gradient=gradients[rows])
    one.upstream = one.upstream._replace(penalty=penalty)
    want = TorchStages().gradient(one.kept, one.upstream, one.resolved()).hidden
    if listed:  # rows without a gradient stand after the others, and hold anything
        one.kept = one.kept._replace(
            rows=torch.cat([rows, every[~dense]]),
            safety_alone=None,
            ce_gradient=torch.cat([gradients[rows], gradients[~dense] * float("nan")]),
        )
        one.upstream = one.upstream._replace(dense=dense)
    got = TritonBackend().gradient(one.kept, one.upstream, one.resolved()).hidden
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not got[every % 3 == 2].any() or one.upstream.cross_entropy is None


def test_without_a_constraint():
    """An upstream gradient that is one number for all rows has no stride."""
    one = Setting("mse", 9)
    upstream = Upstream(torch.tensor(0.5).expand(ROWS))
    found = TritonBackend().gradient(one.kept, upstream, one.resolved())
    torch.testing.assert_close(found.hidden, 0.5 * one.kept.ce_gradient)
    assert found.beta is None


def test_hidden_states_that_need_none():
    """A trained head alone takes β, and no pass over D."""
    one = Setting("logprob", 9)
    found = TritonBackend().gradient(one.kept, one.upstream, one.resolved((False, True, False)))
    assert found.hidden is None
    _, beta, _ = one.truth(one.upstream.penalty)
    torch.testing.assert_close(found.beta.double(), beta, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_that_is_gone():
    """The backward reads the K kept rows: whoever gathered the weight may have freed it."""
    case = make_case(9, 150, 16, k=3, kind="mse", strength=0.3).to(torch.float32)
    hidden, weight = case.hidden_states.clone().requires_grad_(), case.weight.clone()
    settings = {**case.settings, "backend": TritonBackend(), "filter_eps": 0.0}
    loss = linear_cross_entropy(hidden, weight, case.labels, reference=case.reference, **settings)
    weight.untyped_storage().resize_(0)
    want = case.truth()["hidden_states"]
    assert relative_error(torch.autograd.grad(loss, hidden)[0], want) < 1e-5
