"""The int8 screen: what it multiplies, what it leaves to the refinement, and when it is chosen."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.engine.contract import Block, Head, Tiles
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import balance, quantise_rows
from str_kernels.vocabulary import tile_means
from tests.backends.test_routed import absolute, clustered_case
from tests.cpus import set_cpu
from tests.oracle import make_case, relative_error

CPU = torch.device("cpu")
SHAPES = [(1, 129, 16), (3, 128, 77), (130, 5, 24), (64, 1, 8), (17, 700, 1), (70, 1100, 33)]


def rounded(rows: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """What int8 makes of rows, fp64."""
    eight, scales = quantise_rows(rows, torch.int8, columns)
    return eight.double() * scales.double()[:, None]


@pytest.mark.parametrize("has", [True, False], ids=["instructions", "none"])
@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize(("n", "vocab", "dim"), SHAPES)
@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(softcap=20.0, logit_scale=0.7)], ids=["plain", "capped"]
)
def test_log_masses_are_those_of_the_rounded_operands(
    monkeypatch, options, n, vocab, dim, balanced, kept, has
):
    """Only operands are rounded: log-masses equal fp64's of them, by either way to multiply."""
    set_cpu(monkeypatch, int8=has)
    case = make_case(n, vocab, dim, bias=True).to(torch.float32)
    case.weight[0] = 0.0
    states = case.hidden_states if balanced else None
    index = VocabularyIndex.build(case.weight, states, screen="int8" if kept else None)
    tiles = tiles_of(case.weight, index, fresh=False)
    head = Head(case.hidden_states, case.weight, case.bias)
    got = screen_tiles(Block(head, case.labels, tiles, options), "int8", 2 * TILE)
    columns = balance(case.hidden_states, case.weight) if balanced else None
    inverse = None if columns is None else 1 / columns
    logits = rounded(case.hidden_states, inverse) @ rounded(case.weight, columns).T
    logits += case.bias.double()
    logits = options.logit_scale * logits
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    parts = logits[:, index.order].split(TILE, 1)
    want = torch.stack([torch.logsumexp(part, -1) for part in parts], 1)
    assert (absolute(got) - want).abs().max() < 2e-5
    if options.softcap is not None:
        slopes = [(torch.softmax(z, -1) * (1 - (z / options.softcap) ** 2)).sum(-1) for z in parts]
        assert (got.slope - torch.stack(slopes, 1)).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 20.0, "logit_scale": 0.7}])
def test_rounding_is_refined_away(options, dtype):
    """The error of a screened logit (1/127 of a row's largest) is left in dead mass alone.

    Dead tiles hold a few times ε = 2⁻¹¹ of the open mass between them: the loss is off by their
    mass times the screen's error, below 1e-3, and the gradient by at most twice their mass; 16-bit
    gradients are rounded once, by 2⁻⁹ a number.
    """
    case = clustered_case(48, 900, 32, **options).to(dtype)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    hidden = case.hidden_states.clone().requires_grad_()
    loss, parts = linear_cross_entropy(
        hidden,
        case.weight,
        case.labels,
        bias=case.bias,
        screen="int8",
        index=index,
        return_parts=True,
        **case.settings,
    )
    loss.backward()
    truth = case.truth()
    assert 0 < parts.dead_mass.max() < 0.05
    assert relative_error(loss, truth["loss"]) < 1e-3
    assert relative_error(hidden.grad, truth["hidden_states"]) < 5e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "hidden_states"])
def test_what_is_not_finite_is_screened_exactly(where, value):
    """NaN and inf have no 8 bits: the block is screened exactly, with the exact screen's result."""
    case = clustered_case(20, 500).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    getattr(case, where)[1, 3] = value  # row 1 has a label
    runs = [
        linear_cross_entropy(
            case.hidden_states,
            case.weight.clone().requires_grad_(),
            case.labels,
            screen=screen,
            index=index,
            reduction="none",
        ).detach()
        for screen in ("exact", "int8")
    ]
    torch.testing.assert_close(*runs, equal_nan=True, rtol=1e-3, atol=1e-3)
    assert not runs[0].isfinite().all()


def test_a_large_column_takes_no_bits_from_the_others():
    """Balanced, the error is what it is without the outlier; unbalanced, many times that."""
    case = clustered_case(48, 900, 32).to(torch.float32)
    truth = case.hidden_states.double() @ case.weight.double().T
    errors = []
    for factor in (1.0, 50.0):
        case.hidden_states[:, 5] *= factor
        case.weight[:, 5] /= factor
        columns = balance(case.hidden_states, case.weight)
        for left, right in ((1 / columns, columns), (None, None)):
            got = rounded(case.hidden_states, left) @ rounded(case.weight, right).T
            errors.append(relative_error(got, truth))
    balanced, plain, outlier, outlier_plain = errors
    assert balanced < 1.1 * plain
    assert outlier < 1.2 * balanced
    assert outlier_plain > 3 * outlier


def test_balance_of_what_it_cannot_read():
    """Columns of zeros, with NaN, inf or beyond fp32's squares count as the mean of the others."""
    hidden, weight = torch.rand(5, 8) + 1, torch.rand(3000, 8) + 1
    hidden[:, 0], weight[:, 1] = 0.0, 0.0
    hidden[1, 2], weight[0, 3], hidden[0, 4] = float("nan"), float("inf"), 1e30
    columns = balance(hidden, weight)
    assert columns[:5].tolist() == [1.0] * 5
    assert columns[5:].log().sum().abs() < 1e-5
    assert (columns[5:] != 1.0).all()
    assert torch.equal(balance(torch.zeros(3, 4), torch.zeros(3, 4)), torch.ones(4))


def test_balance_is_of_proportions():
    """Of H a million times as large nothing changes; a column of W that is zero costs no bits."""
    case = clustered_case(48, 900, 32).to(torch.float32)
    hidden, weight = case.hidden_states, case.weight
    torch.testing.assert_close(balance(1e6 * hidden, weight), balance(hidden, weight))
    weight[:, 3] = 0.0
    columns, truth = balance(hidden, weight), hidden.double() @ weight.double().T
    got = rounded(hidden, 1 / columns) @ rounded(weight, columns).T
    assert relative_error(got, truth) < 1.05 * relative_error(
        rounded(hidden) @ rounded(weight).T, truth
    )


@pytest.mark.parametrize("kept", [False, True], ids=["made", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype, kept):
    """Beside other rows, of whatever size, a row's results differ by the order of sums alone."""
    case = clustered_case(120, 900, 32).to(dtype)
    screen = "int8" if kept else None
    index = VocabularyIndex.build(case.weight, case.hidden_states, screen=screen)
    settings = {"filter_eps": 2.0**-7, "index": index, "screen": "int8"}

    def rows(part: torch.Tensor, *, wild: bool = False) -> tuple[torch.Tensor, ...]:
        hidden = case.hidden_states[part]
        if wild:  # columns of another shape, which a balance of the batch would follow
            hidden[1::2] *= torch.logspace(-1, 1, 32).to(dtype)
        hidden.requires_grad_()
        loss, parts = linear_cross_entropy(
            hidden, case.weight, case.labels[part], reduction="none", return_parts=True, **settings
        )
        gradient = torch.autograd.grad(loss.sum(), hidden)[0]
        return loss.detach(), gradient, parts.live_share, parts.dead_mass

    whole = rows(torch.arange(120))
    assert 0 < whole[2].nanmean() < 1
    for part in (torch.arange(3), torch.arange(40, 100), torch.randperm(120)):
        for moved, among in zip(rows(part), whole, strict=True):
            assert_same(moved, among[part])
        for moved, among in zip(rows(part, wild=True), whole, strict=True):
            assert_same(moved[::2], among[part[::2]])


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for the order of fp32's sums, or for one rounding to bf16."""
    tolerance = 2.0**-8 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6, equal_nan=True)


def test_columns_of_other_states_serve_as_well():
    """A balance from other states of the same kind leaves the error of a screened logit as it is;
    without states there is none.
    """
    case = clustered_case(400, 900, 32).to(torch.float32)
    case.hidden_states[:, 5] *= 30.0
    case.weight[:, 5] /= 30.0
    mine, others = case.hidden_states[:80], case.hidden_states[80:]
    truth = mine.double() @ case.weight.double().T
    fixed = VocabularyIndex.build(case.weight, others).columns
    assert VocabularyIndex.build(case.weight).columns is None
    errors = []
    for columns in (balance(mine, case.weight), fixed, None):
        inverse = None if columns is None else 1 / columns
        errors.append(
            relative_error(rounded(mine, inverse) @ rounded(case.weight, columns).T, truth)
        )
    assert errors[1] < 1.1 * errors[0] < 0.5 * errors[2]


def test_a_row_of_one_large_number_is_still_right():
    """An outlier leaves the other numbers of its row no bits; refined pairs do not care."""
    case = clustered_case(48, 900, 32).to(torch.float32)
    case.weight[:, 5] *= 30.0
    case.hidden_states[:, 5] *= 0.05
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    got = case.run(screen="int8", index=index)
    assert relative_error(got["loss"], case.truth()["loss"]) < 5e-3


def test_it_is_chosen_where_it_is_faster(monkeypatch):
    """int8 with its instructions, unless matrix tiles multiply bf16 as fast."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def chosen(**has: bool) -> list[str]:
        set_cpu(monkeypatch, **has)
        return [TorchBackend().auto_screen(dtype, CPU, 2048) for dtype in dtypes]

    assert chosen(int8=True, bf16=True) == ["int8", "int8", "int8", "exact"]
    assert chosen(int8=True) == ["int8", "int8", "int8", "exact"]
    assert chosen(int8=True, amx=True, bf16=True) == ["bf16", "exact", "exact", "exact"]
    assert chosen(int8=False, bf16=True) == ["bf16", "exact", "exact", "exact"]
    assert chosen(int8=False) == ["exact"] * 4


def test_only_cpus_have_it():
    """Torch multiplies int8 on GPUs under conditions that blocks do not meet: refused by name."""
    refusal = TorchBackend().refuses("int8", torch.float32, torch.device("cuda"))
    assert "CPU" in refusal
    assert TorchBackend().refuses("int8", torch.float32, CPU) is None


def test_quantised_rows_without_an_index():
    """In token order, mean rows and all: ``screen='int8'`` by name filters there too."""
    case = clustered_case(48, 900, 32).to(torch.float32)
    head = Head(case.hidden_states, case.weight, None)
    tiles = Tiles(None, None, tile_means(case.weight, None))
    block = Block(head, case.labels, tiles, LossOptions())
    got, exact = (absolute(screen_tiles(block, name, TILE)) for name in ("int8", "exact"))
    assert 1e-4 < (got - exact).abs().max() < 0.3
