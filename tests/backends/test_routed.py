"""The filtered path: screen, route, refine, finish, with and without an index."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.torch import TorchBackend
from str_kernels.bench.memory import peak_bytes
from str_kernels.engine import cpu
from str_kernels.engine.contract import Block, Head, RowInputs, TileMasses, Tiles, Wanted
from str_kernels.engine.finish import join_pairs
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms
from str_kernels.vocabulary import tile_means
from tests.backends.test_exact import OPTIONS
from tests.oracle import Case, assert_close, filtered_truth, make_case, relative_error

pytestmark = pytest.mark.one_in(3)

# a softcap with label smoothing takes the exact path
ROUTED = [x for x in OPTIONS if not {"softcap", "label_smoothing"} <= x.keys()]
# below every tile's share: all pairs are live, and refined from the original operands
ALL_LIVE = 1e-30


def clustered_case(n: int = 96, vocab: int = 1100, dim: int = 24, **options) -> Case:
    """Head rows in clusters, hidden states near their centres: few tiles matter to a row."""
    case = make_case(n, vocab, dim, seed=3, **options)
    g = torch.Generator().manual_seed(4)
    centres = torch.randn(vocab // 64 + 1, dim, generator=g, dtype=torch.float64)
    centres *= dim**0.5 / centres.norm(dim=-1, keepdim=True)
    member = torch.randint(len(centres), (vocab,), generator=g)
    case.weight = 0.9 * centres[member] + 0.35 * case.weight
    mine = torch.randint(len(centres), (n,), generator=g)
    case.hidden_states = centres[mine] + 0.5 * case.hidden_states
    labels = (case.hidden_states @ case.weight.T).argmax(-1)
    case.labels = torch.where(case.labels == -100, -100, labels)
    return case


def absolute(masses: TileMasses) -> torch.Tensor:
    """Log-masses, no more relative to the rows' anchors."""
    return masses.log_mass.double() + masses.anchor[:, None].double()


def index_of(case: Case) -> VocabularyIndex:
    """Clustered on the case's own states."""
    return VocabularyIndex.build(case.weight, case.hidden_states)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_pair_live_is_exact(options, indexed):
    """With every pair live the stages give the truth in fp64, whatever the order of the tiles."""
    case = clustered_case(**options)
    index = index_of(case) if indexed else None
    got = case.run(filter_eps=ALL_LIVE, index=index, screen="exact")
    assert_close(got, case.truth(), 1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filtered_error_is_small(options):
    """At the default ε the error is that of dead tiles: not zero (it does filter), but small.

    On ten sets of real states it was 0.05 to 0.33 %; clusters are easier, so that is the bound.
    """
    case = clustered_case(**options)
    truth = case.truth()
    got = case.run(filter_eps=DEFAULT_EPS, index=index_of(case), screen="exact")
    assert_close(got, truth, 0.0033)
    softcapped_smoothing = "softcap" in options and "label_smoothing" in options
    # that combination takes the exact path
    assert (relative_error(got["hidden_states"], truth["hidden_states"]) < 1e-9) == (
        softcapped_smoothing
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_label_smoothing_under_autocast(indexed):
    """The sum of the logits is that of the rounded operands, as are those of the other terms."""
    case = clustered_case(40, 500, label_smoothing=0.9).to(torch.float32)
    index = index_of(case) if indexed else None
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run(filter_eps=ALL_LIVE, index=index, screen="exact")["loss"]
    rounded = case.to(torch.bfloat16).to(torch.float64)
    want = torch.nn.functional.cross_entropy(
        rounded.hidden_states @ rounded.weight.T, case.labels, label_smoothing=0.9
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 20.0], ids=["open", "confident"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("options", ROUTED, ids=str)
def test_filtered_is_what_it_promises(options, indexed, sharpness):
    """Live pairs are exact and dead ones their tile's mean, to rounding, in every gradient.

    The confident case has rows whose open mass is below 2^-20, where the share is of that instead.
    """
    case = clustered_case(**options)
    index = index_of(case) if indexed else None
    case.weight *= sharpness  # trained on, after the index was built
    case.labels[::3] = 1099  # in the ragged last tile, and improbable
    order = index.order if indexed else torch.arange(len(case.weight))
    upstream = torch.linspace(-1.0, 2.0, len(case.labels), dtype=torch.float64)
    eps = 2.0**-3  # of 9 tiles, even when the softcap makes all of them alike
    got = case.run(upstream, filter_eps=eps, index=index, screen="exact", reduction="none")
    assert_close(got, filtered_truth(case, upstream, eps, order), 1e-9)


@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_without_upstream_gradient_adds_nothing(options, eps):
    """A row whose logits overflow to inf is absent once its upstream gradient is zero."""
    case = clustered_case(n=40, vocab=300, **options).to(torch.float32)
    case.labels[4] = 5
    if case.position_weights is not None:
        case.position_weights[4] = 1.0
    upstream = torch.ones(40, dtype=torch.float64)
    upstream[4] = 0.0
    truth = case.truth(upstream, reduction="none")
    case.hidden_states[4] = 1e38 * case.weight[7].sign()
    got = case.run(upstream, filter_eps=eps, screen="exact", reduction="none")
    assert not got["loss"][4].isfinite() or "softcap" in options
    del got["loss"], truth["loss"]
    assert (truth["hidden_states"][4] == 0).all()
    assert_close(got, truth, 5e-6 if eps == 0.0 else 0.01)


@pytest.mark.parametrize("size", [640, 20_000, 100_000, 1_000_000])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"k": 5, "kind": "logprob"}], ids=str)
def test_logits_too_large_for_a_bf16_screen(options, size):
    """Where bf16 is off by more than a nat the block is screened exactly: no NaN, and as accurate.

    bf16 keeps 3 digits, so at a logit of 100,000 it is off by hundreds, and exp of that is inf.
    """
    case = clustered_case(**options)
    index = index_of(case)
    case.weight *= size / (case.hidden_states @ case.weight.T).abs().max()
    case = case.to(torch.float32)
    arguments = {"filter_eps": DEFAULT_EPS, "index": index}
    got, exactly = (case.run(screen=screen, **arguments) for screen in ("bf16", "exact"))
    assert all(value.isfinite().all() for value in got.values())
    assert_close(got, exactly, 1e-4 if size == 640 else 1e-12)


class Recorder(TorchBackend):
    """Takes 20 rows at once, and notes how each block was screened."""

    def __init__(self) -> None:
        super().__init__()
        self.screens: list[str] = []

    def row_block(self, head, rows, *, routed):
        return 20

    def screen(self, block, screen):
        self.screens.append(screen)
        return super().screen(block, screen)


def test_only_the_block_that_is_off_is_screened_again():
    """Its results take the place of the first ones; the others' stay."""
    case = clustered_case(60, ignored=0.0).to(torch.float32)
    index, backend = index_of(case), Recorder()
    case.hidden_states[20:40] *= 1e4
    arguments = {"filter_eps": DEFAULT_EPS, "index": index}
    got = case.run(backend=backend, screen="bf16", **arguments)
    assert backend.screens == ["bf16", "bf16", "bf16", "exact"]
    exactly = case.run(backend=Recorder(), screen="exact", **arguments)
    there = slice(20, 40)
    torch.testing.assert_close(got["hidden_states"][there], exactly["hidden_states"][there])
    assert_close(got, exactly, 1e-3)


class Together(Recorder):
    """Screens two blocks as one."""

    def screen_rows(self, head, size, screen):
        return 2 * size

    def screen(self, block, screen):
        self.screens.append(len(block.labels))
        return TorchBackend.screen(self, block, screen)


@pytest.mark.parametrize("ignored", [0.0, 0.3], ids=["every row", "some rows"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "bias": True}], ids=str)
def test_blocks_that_are_screened_as_one(options, ignored):
    """Each block has its own rows' masses and slopes: the results of blocks screened alone."""
    case = clustered_case(70, ignored=ignored, **options)
    arguments = {"filter_eps": DEFAULT_EPS, "index": index_of(case), "screen": "exact"}
    backend, alone = Together(), Recorder()
    got, want = (case.run(backend=one, **arguments) for one in (backend, alone))
    assert len(backend.screens) == -(-len(alone.screens) // 2) < len(alone.screens)
    assert sum(backend.screens) == (case.labels >= 0).sum()
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("filter_eps", [0.0, DEFAULT_EPS])
@pytest.mark.parametrize("kind", ["mse", "logprob"])
def test_one_term_alone_has_its_gradient(kind, filter_eps):
    """Penalty or cross-entropy without the other: nobody asks for the other's gradient."""
    case = clustered_case(30, k=7, kind=kind)
    safety = case.settings["safety"]
    for term in ("penalty", "cross_entropy"):
        gradients = []
        for backend, options in (
            ("torch", LossOptions(safety=safety, filter_eps=filter_eps, screen="exact")),
            ("dense", LossOptions(safety=safety)),
        ):
            hidden = case.hidden_states.clone().requires_grad_()
            inputs = RowInputs(case.labels, case.reference, case.position_weights)
            rows = row_terms(Head(hidden, case.weight, None), inputs, options, backend=backend)
            gradients += torch.autograd.grad(getattr(rows, term).sum(), hidden)
        # mse reads its K columns alone, which no filter touches
        exact = not filter_eps or (kind, term) == ("mse", "penalty")
        assert relative_error(*gradients) < (1e-9 if exact else 1e-4)


@pytest.mark.parametrize("n", [20, 60, 200])
def test_token_accuracy_and_entropy(n):
    """Labels are compared with the largest logit of cold, warm and hot tiles; entropy is exact."""
    case = clustered_case(n)
    case.labels[::2] = 7  # mostly wrong
    logits = case.hidden_states @ case.weight.T
    options = LossOptions(filter_eps=DEFAULT_EPS, screen="exact")
    head, inputs = Head(case.hidden_states, case.weight, None), RowInputs(case.labels)
    rows = row_terms(head, inputs, options)
    assert torch.equal(rows.statistics.correct, logits.argmax(-1) == case.labels)
    assert 0 < rows.statistics.correct.sum() < n
    assert (rows.statistics.dead_mass > 0).any()
    rows = row_terms(head, inputs, options, entropy=True)
    labelled = case.labels != -100
    truth = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(rows.statistics.entropy[labelled], truth[labelled])


@pytest.mark.parametrize("trainable", [False, True])
def test_smoothing_of_a_weight_that_moved(trainable):
    """Evaluation: the sum of all logits is that of the weight as it is, not as it was indexed."""
    case = clustered_case(label_smoothing=0.1)
    index = index_of(case)
    index.mean_rows.add_(1.0)
    with torch.no_grad():
        loss = linear_cross_entropy(
            case.hidden_states,
            case.weight.requires_grad_(trainable),
            case.labels,
            index=index,
            label_smoothing=0.1,
            screen="exact",
        )
    torch.testing.assert_close(loss, case.truth()["loss"], rtol=1e-9, atol=0)


def test_auto_screen_without_mkldnn(monkeypatch):
    """Where torch has no mkldnn (macOS) the filter screens in the operands' own precision."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    monkeypatch.setattr(cpu, "_ask", cpu._ask.__wrapped__)  # what it knows of this CPU is kept
    case = clustered_case(n=8).to(torch.float32)
    got = case.run(index=index_of(case), filter_eps=ALL_LIVE)
    assert_close(got, case.truth(), 5e-6)


def test_bf16_screen_is_refined_away():
    """Rounding the screen to bf16 costs nothing in the live mass: the loss stays within 1e-3."""
    case = clustered_case().to(torch.float32)
    got = case.run(screen="bf16", index=index_of(case))
    truth = case.truth()
    assert relative_error(got["loss"], truth["loss"]) < 1e-3
    assert relative_error(got["hidden_states"], truth["hidden_states"]) < 0.01


def test_a_row_does_not_depend_on_its_batch():
    """Rows alone and in a batch differ by rounding only: liveness is relative to the row.

    The parts take tiles cold, warm and hot, as the whole does.
    """
    case = clustered_case(200)
    settings = {"filter_eps": DEFAULT_EPS, "index": index_of(case), "screen": "exact"}

    def rows(part: slice) -> tuple[torch.Tensor, ...]:
        hidden = case.hidden_states[part].requires_grad_()
        loss, parts = linear_cross_entropy(
            hidden, case.weight, case.labels[part], reduction="none", return_parts=True, **settings
        )
        return loss, torch.autograd.grad(loss.sum(), hidden)[0], parts.live_share, parts.dead_mass

    whole = rows(slice(None))
    assert 0 < whole[2].nanmean() < 1
    for part in (slice(0, 1), slice(5, 20), slice(20, 53), slice(60, 130)):
        for alone, among in zip(rows(part), whole, strict=True):
            torch.testing.assert_close(alone, among[part], rtol=1e-10, atol=1e-12, equal_nan=True)


def stages(case: Case, eps: float, labels: torch.Tensor | None = None):
    """Run the stages one by one on the case's rows in token order."""
    backend, options = TorchBackend(), LossOptions()
    head = Head(case.hidden_states, case.weight, None)
    labels = case.labels.masked_fill(case.labels == -100, -1) if labels is None else labels
    tiles = Tiles(None, None, tile_means(case.weight, None))
    wanted = Wanted(hidden=True, masses=True, entropy=False)
    block = Block(head, labels, tiles, options)
    masses = backend.screen(block, "exact")
    work = backend.route(block, masses, eps)
    refined = backend.refine(block, work, wanted)
    return masses, work, join_pairs(block, masses, work, refined, wanted)


def test_masses_sum_to_one():
    """Live, dead and label's mass of each row sum to 1 under the lse that the loss uses."""
    case = clustered_case(ignored=0.0)
    _, work, dense = stages(case, 2.0**-7)
    assert 0 < len(work.rows) < work.dead.numel()
    p_label = torch.exp(dense.label_logit - dense.statistics.lse)
    torch.testing.assert_close(dense.open_mass + p_label, torch.ones_like(p_label))
    assert (dense.statistics.dead_mass > 0).any()
    live = dense.masses < 0
    torch.testing.assert_close(
        dense.masses.masked_fill(live, 0).sum(-1), dense.statistics.dead_mass
    )


@pytest.mark.parametrize("kind", ["one tile", "equal logits", "huge logit", "label far away"])
def test_adversarial_routing(kind):
    """All rows in one tile, no pair above ε, one huge logit, an improbable label: still right."""
    case = clustered_case(ignored=0.0, vocab=1100)
    if kind == "one tile":
        case.hidden_states = case.weight[:1].expand(96, -1).contiguous() * 3
    elif kind == "equal logits":
        case.hidden_states = torch.zeros_like(case.hidden_states)
    elif kind == "huge logit":
        case.hidden_states[:, 0], case.weight[7, 0] = 30.0, 30.0
    else:
        case.labels = (case.hidden_states @ case.weight.T).argmin(-1)
    truth = case.truth()
    got = case.run(filter_eps=0.9 if kind == "equal logits" else DEFAULT_EPS, screen="exact")
    for name in ("loss", "hidden_states"):
        scale = truth[name].norm() + 1e-6
        assert (got[name] - truth[name]).norm() <= 0.02 * scale, name


@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min, -float("inf")])
def test_a_masked_first_token_hides_no_tile(masked):
    """A masked token that opens a tile leaves the others' mass as it is, in fp32 too.

    The mass of what is left is near 1: its error is fp32 rounding and the filter's (5e-4 at most).
    """
    case = clustered_case(bias=True)
    case.bias[::128] = masked
    case.labels[case.labels % 128 == 0] = -100
    case = case.to(torch.float32)
    truth = case.truth()
    got = case.run(filter_eps=DEFAULT_EPS, screen="exact")
    assert relative_error(got["loss"], truth["loss"]) < 1e-6
    assert relative_error(got["hidden_states"], truth["hidden_states"]) < 1e-3


def test_dead_mass_is_returned():
    """`return_parts` tells each position's approximated probability; 0 on the exact path."""
    case = clustered_case()
    arguments = (case.hidden_states, case.weight, case.labels)
    _, parts = linear_cross_entropy(*arguments, filter_eps=2.0**-7, return_parts=True)
    assert parts.dead_mass.shape == case.labels.shape
    assert parts.dead_mass.max() > 0
    assert (parts.dead_mass[case.labels == -100] == 0).all()
    assert linear_cross_entropy(*arguments, return_parts=True)[1].dead_mass.max() == 0


@pytest.mark.parametrize(
    ("live", "trainable"),
    [
        ("few", False),
        *(
            pytest.param(live, trainable, marks=pytest.mark.slow)
            for live in ("few", "exact", "all")
            for trainable in (False, True)
            if (live, trainable) != ("few", False)
        ),
    ],
)
def test_memory_follows_the_budget(live, trainable):
    """A step's peak is two and a half budgets and what it hands on, whatever share is live.

    Handed on: row gradients; for a trainable weight its gradient and the dead masses. The logits
    would take 114 MiB.
    """
    budget = 1 << 20
    case = make_case(1500, 20_000, 16).to(torch.float32)
    hidden = case.hidden_states.requires_grad_()
    flat = 0.0 if live == "all" else 1.0
    weight = (flat * case.weight).requires_grad_(trainable)
    settings = {"filter_eps": {"exact": 0.0, "few": 0.05, "all": DEFAULT_EPS}[live]}

    def step():
        linear_cross_entropy(
            hidden, weight, case.labels, screen="exact", backend=TorchBackend(budget), **settings
        ).backward()

    handed_on = 2 * hidden.nbytes
    if trainable:
        handed_on += weight.nbytes + 4 * 1500 * len(tile_means(case.weight, None))
    assert peak_bytes(step, hidden.device).peak <= 2.5 * budget + handed_on


@pytest.mark.parametrize("kind", [None, "logprob"])
@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
def test_memory_of_wide_hidden_states(eps, kind):
    """Blocks of ``[R, D]`` count as well: the forward's peak is two budgets and what it hands on.

    Handed on: the row gradients of each term, twice while blocks are put together.
    """
    budget = 4 << 20
    case = make_case(1500, 1000, 1024, **({"k": 4, "kind": kind} if kind else {})).to(torch.float32)
    hidden = case.hidden_states.requires_grad_()
    labelled = int((case.labels != -100).sum())
    handed_on = 2 * 4 * 1024 * labelled * (2 if kind else 1)

    def forward():
        return linear_cross_entropy(
            hidden,
            case.weight,
            case.labels,
            reference=case.reference,
            filter_eps=eps,
            screen="exact",
            backend=TorchBackend(budget),
            safety=case.settings.get("safety"),
        )

    assert peak_bytes(forward, hidden.device).peak <= 2 * budget + handed_on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"label_smoothing": 0.1}], ids=str)
def test_half_precision_operands(options, dtype):
    """16-bit operands: screened and, for dead pairs, multiplied as the CPU can, refined in fp32.

    The bound is the filter's own on this head, and the rounding of the gradients to 16 bit.
    """
    case = clustered_case(**options).to(dtype)
    got, truth = case.run(index=index_of(case)), case.truth()
    assert relative_error(got["loss"], truth["loss"]) < 1e-3
    for name in ("hidden_states", "weight"):
        assert relative_error(got[name], truth[name]) < 0.0033 + 2.0**-8, name
