"""What follows from a row's sums, beside torch calls and plain fp64."""

from __future__ import annotations

import pytest
import torch

from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.triton.finish import join_rows as join
from str_kernels.engine.contract import Block, Dense, Head, OpenRows, RowSums
from str_kernels.engine.finish import join_rows
from str_kernels.engine.rows import cross_entropy, row_gradients
from str_kernels.options import LossOptions, SafetyConstraint

ROWS, TILES, VOCAB, DIM = 45, 37, 300, 24
INF, NAN = float("inf"), float("nan")
OPTIONS = [
    {},
    {"z_loss": 1e-3, "logit_scale": 0.7},
    {"label_smoothing": 0.1},
    {"softcap": 20.0, "z_loss": 1e-3},
]


class Given:
    """Random sums of rows between a sure label and a hopeless one; some have no label."""

    def __init__(self, offset=0.0, dead=True, **options):
        g = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=g)

        safety = SafetyConstraint([1, 2], kind="logprob")
        self.options = LossOptions(safety=safety, **options)
        head = Head(random(ROWS, DIM), random(VOCAB, DIM), None)
        labels = torch.randint(0, VOCAB, (ROWS,), generator=g)
        labels[::7], labels[1::7] = -1, -2
        self.block = Block(head, labels, None, self.options)
        shift = offset + random(ROWS)
        self.label_logit = shift + torch.linspace(-40, 40, ROWS)
        if "softcap" in options:
            self.label_logit = self.label_logit.clamp(-19.9, 19.9)
        self.label_logit[labels < 0] = NAN
        masses = None
        if dead:  # written as a backend writes it, [T, R]
            masses = torch.rand(TILES, ROWS, generator=g).T * 1e-3
            masses[:, ::3] = -0.0
            masses[:, 1] = 0.0  # underflowed, not live
        maximum = torch.maximum(shift, shift + random(ROWS))
        logit_sum = random(ROWS) * VOCAB if "label_smoothing" in options else None
        weighted = None if dead else -random(ROWS).abs()
        mass = random(ROWS).abs() + 1e-3
        rounded = (None, None) if dead else (random(ROWS).abs(), random(ROWS).abs())
        if not dead:
            rounded[1][::4] = 0.0
        self.sums = RowSums(shift, mass, maximum, masses, weighted, logit_sum, *rounded)
        self.expected = random(ROWS, DIM)

    def gradients(self, joined, stages):
        """Row gradients and loss, from what was joined."""
        opened = OpenRows(self.expected.clone(), None, joined.scale)
        smooth = torch.ones(DIM) if self.options.label_smoothing else None
        dense = Dense(
            joined.statistics,
            self.label_logit.to(joined.rescale.dtype),
            joined.surprise,
            joined.open_mass,
            opened,
            self.sums.logit_sum,
            smooth,
            factors=joined.factors,
        )
        return cross_entropy(dense, self.options, VOCAB), *row_gradients(stages, self.block, dense)

    def check(self, tolerance=5e-6):
        got = join(self.block, self.label_logit, self.sums)
        double = RowSums(*(None if x is None else x.double() for x in self.sums))
        want = join_rows(self.block, self.label_logit.double(), double)
        labelled = self.block.labels >= 0
        for name in ("lse", "dead_mass", "live_share", "entropy"):
            mine, other = getattr(got.statistics, name), getattr(want.statistics, name)
            assert (mine is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance)
        assert torch.equal(got.statistics.correct, want.statistics.correct)
        for name in ("surprise", "open_mass", "rescale", "scale"):
            mine, other = getattr(got, name), getattr(want, name)
            if name == "surprise":
                mine, other = mine[labelled], other[labelled]
            # relative to themselves, however sure a row is, but for the rounding of logits of 40
            torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=0)
        whole = got.statistics.lse.double() + got.statistics.lse_rest.double()
        exact = want.statistics.lse + want.statistics.lse_rest
        torch.testing.assert_close(whole, exact, rtol=1e-9, atol=1e-6)
        stages = TorchBackend()
        mine, other = self.gradients(got, stages), self.gradients(want, stages)
        for one, truth in zip(mine, other, strict=True):
            torch.testing.assert_close(
                one.double(), truth.double(), rtol=5e-6, atol=5e-6, equal_nan=True
            )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dead", [True, False])
def test_every_option(options, dead):
    """Losses, statistics and row gradients of routed and of exact rows."""
    Given(dead=dead, **options).check()


def test_large_logits():
    """A loss keeps its digits beside a log-sum-exp of 16384."""
    Given(offset=16384.0).check(1e-5)


def test_edges():
    """No other token, infinite and NaN logits: what torch calls make of them."""
    given = Given(dead=False)
    sums, labels = given.sums, given.block.labels
    labels[:8] = 3
    given.label_logit[:8] = torch.tensor([1.0, INF, -INF, NAN, 2.0, 3.0, -INF, INF])
    sums.mass[:8] = torch.tensor([0.0, 1.0, 1.0, 1.0, INF, NAN, 0.0, 0.0])
    got = join(given.block, given.label_logit, sums)
    want = join_rows(given.block, given.label_logit, sums)
    for name in ("surprise", "open_mass", "rescale", "scale"):
        torch.testing.assert_close(
            getattr(got, name)[:8], getattr(want, name)[:8], equal_nan=True, msg=name
        )
    for name in ("lse", "lse_rest"):
        mine, other = getattr(got.statistics, name), getattr(want.statistics, name)
        torch.testing.assert_close(mine[:8], other[:8], equal_nan=True, msg=name)
    assert got.surprise[0] == 0.0
