"""The exact pass by BLAS against the fp64 truth; on a CPU it multiplies in fp32."""

from __future__ import annotations

import pytest
import torch

from str_kernels.backends.triton import TritonBackend, exact_blas
from str_kernels.backends.triton.exact_blas import _even, blas_refusal
from str_kernels.backends.triton.launch import Launch, Product
from str_kernels.bench.launches import counted_launches
from str_kernels.engine.contract import Block, Head, Wanted
from str_kernels.options import LossOptions
from tests.backends.test_exact import OPTIONS
from tests.oracle import Case, assert_close, make_case, relative_error
from tests.triton.interpreted.test_truth import TOLERANCE, check_statistics
from tests.triton.interpreted.test_truth import check as check_case

BLAS = [options for options in OPTIONS if not {"softcap", "label_smoothing"} <= set(options)]


@pytest.fixture(params=[pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def backend(request, monkeypatch):
    """The pass by BLAS in one block, and cut into as many as the code can make."""
    if request.param == "whole":
        monkeypatch.setattr(exact_blas, "SHARES", Launch(16, 256))
        return TritonBackend(exact="blas")
    monkeypatch.setattr(exact_blas, "PRODUCT", exact_blas.PRODUCT._replace(rows=16))
    return TritonBackend(1, exact="blas")


class SmallBlocks(TritonBackend):
    """Takes a fixed number of rows at a time."""

    def __init__(self, rows, **given):
        super().__init__(**given)
        self.rows = rows

    def row_block(self, head, rows, *, routed):
        """Return the rows of a block."""
        return min(rows, self.rows)


def check(case: Case, dtype: torch.dtype, backend: TritonBackend, **overrides) -> None:
    """Loss and all gradients within the tolerances of ``dtype``."""
    check_case(case, dtype, backend=backend, filter_eps=0.0, **overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", BLAS, ids=str)
def test_every_option(options, dtype, backend):
    """Loss and gradients of hidden states, weight and bias."""
    check(make_case(**options), dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    "held", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_maximum_that_rises_late(held, monkeypatch):
    """A token 300 nats above the first block: what was summed before is rescaled, and not lost.

    Its word is in the last block, in one in the middle and in one whose p are not multiplied yet;
    rows without such a token share the block.
    """
    monkeypatch.setattr(exact_blas, "PRODUCT", Product(32, 128))
    backend = TritonBackend(2 * 128 * 32 * (4 + 2 * held), exact="blas")
    monkeypatch.setattr(exact_blas, "SHARES", Launch(8, 128))
    case = make_case(40, 1300, 24, bias=True, ignored=0.1)
    for row, word, height in ((0, 1299, 300.0), (1, 700, 140.0), (2, 300, 59.0), (3, 200, 90.0)):
        case.hidden_states[row] = case.weight[word] * height / case.weight[word].square().sum()
    case.labels[:4] = torch.tensor([5, 5, 300, -100])
    check(case, torch.bfloat16, backend)
    case.settings["reduction"] = "none"
    got, truth = case.to(torch.float32).run(backend=backend, filter_eps=0.0), case.truth()
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-5, atol=1e-6)
    error = (got["hidden_states"] - truth["hidden_states"]).norm(dim=-1)
    assert (error <= 2e-5 * truth["hidden_states"].norm(dim=-1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, pytest.param(-1.0, marks=pytest.mark.slow)])
def test_every_block_rises(sign, backend):
    """Logits that climb, or fall, by 70 nats a tile: a shift for each, or one for all."""
    case = make_case(20, 700, 24, bias=True, ignored=0.2)
    case.bias += sign * 70.0 * (torch.arange(700) // 128)
    check(case, torch.float32, backend)
    check(case, torch.bfloat16, backend)


@pytest.mark.slow
def test_masked_tokens(backend):
    """A bias of -inf on the first block, or on all words but the label, leaves no NaN."""
    case = make_case(20, 520, 24, bias=True)
    case.labels[case.labels >= 0] = 450
    for masked in (slice(0, 256), slice(100, 449), slice(0, 450)):
        masking = Case(**{**vars(case), "bias": case.bias.clone()})
        masking.bias[masked] = float("-inf")
        got = masking.to(torch.float32).run(backend=backend, filter_eps=0.0)
        truth = masking.truth()
        for name in ("loss", "hidden_states"):
            assert relative_error(got[name], truth[name]) < 1e-5, (masked, name)
    masking.bias[451:] = float("-inf")
    got = masking.to(torch.float32).run(backend=backend, filter_eps=0.0)
    assert got["loss"] == 0
    assert (got["hidden_states"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_rows_stay_alone(value, backend):
    """NaN or inf in one row's hidden states breaks that row's loss and gradient, and no other's."""
    case = make_case(40, 300, 24, ignored=0.0, reduction="none").to(torch.bfloat16)
    want = case.run(backend=backend, filter_eps=0.0)
    case.hidden_states[3, 2] = value
    got = case.run(backend=backend, filter_eps=0.0)
    keep = torch.arange(40) != 3
    assert not got["loss"][3].isfinite()
    for name in ("loss", "hidden_states"):
        torch.testing.assert_close(got[name][keep], want[name][keep], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n", "vocab", "dim"), [(1, 129, 16), (3, 128, 77), (130, 5, 24), (64, 1, 8), (70, 257, 1)]
)
def test_ragged_shapes(n, vocab, dim, backend):
    """One row, one token, one dimension, and a last block of one word."""
    case = make_case(n, vocab, dim, bias=True, ignored=0.0).to(torch.float32)
    got, truth = case.run(backend=backend, filter_eps=0.0), case.truth()
    for name, want in truth.items():
        assert (got[name] - want).norm() <= 1e-5 * (want.norm() + 0.1), name


@pytest.mark.parametrize("hidden", [True, False])
def test_no_rows(hidden, backend):
    """A block of no rows has results of no rows."""
    head = Head(torch.zeros(0, 8), torch.randn(300, 8), None)
    block = Block(head, torch.zeros(0, dtype=torch.long), None, LossOptions())
    dense = backend.exact(block, Wanted(hidden=hidden, masses=False, entropy=True))
    assert dense.statistics.lse.shape == dense.statistics.entropy.shape == (0,)
    assert (dense.opened is not None) == hidden


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_statistics(softcap, backend):
    """Entropy, log-sum-exp and accuracy, with and without a softcap."""
    check_statistics(backend, softcap)


@pytest.mark.slow
def test_a_weight_in_fp32_under_autocast(backend):
    """W is cast block by block: bitwise what a weight in bf16 gives."""
    case = make_case(37, 400, 24).to(torch.bfloat16)
    case.settings["reduction"] = "sum"
    want = case.run(backend=backend, filter_eps=0.0)
    case.weight, case.hidden_states = case.weight.float(), case.hidden_states.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run(backend=backend, filter_eps=0.0)
    for name in ("loss", "hidden_states"):
        assert relative_error(got[name], want[name]) < TOLERANCE[torch.bfloat16] / 8, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale",
    [pytest.param(5, marks=pytest.mark.slow), 40, pytest.param(640, marks=pytest.mark.slow)],
)
def test_confident_rows_keep_their_gradient(scale, backend):
    """A label up to 640 nats above all others: the others' probabilities do not underflow."""
    case = make_case(32, 300, 16, ignored=0.0, reduction="sum")
    case.hidden_states /= case.hidden_states.norm(dim=-1, keepdim=True)
    case.weight *= scale / case.weight.norm(dim=-1).max()
    case.labels = (case.hidden_states @ case.weight.T).argmax(-1)
    for dtype in (torch.float32, torch.bfloat16):
        got, truth = case.to(dtype).run(backend=backend, filter_eps=0.0), case.to(dtype).truth()
        tolerance = max(TOLERANCE[dtype], scale * 2.0**-19)
        assert relative_error(got["hidden_states"], truth["hidden_states"]) < tolerance
        assert relative_error(got["loss"], truth["loss"]) < max(1e-5, scale * 2.0**-19)


@pytest.mark.slow
def test_deterministic_and_no_uninitialised_memory(backend):
    """Deterministic mode fills new memory with NaN; none shows, and results repeat bitwise."""
    case = make_case(48, 600, 24, bias=True, softcap=9.0).to(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first = case.run(backend=backend, filter_eps=0.0)
        again = case.run(backend=backend, filter_eps=0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert_close(first, case.truth(), 1e-5)


@pytest.mark.parametrize(("labelled", "computed"), [(0, 1), (17, 2), (100, 7)])
def test_rows_without_a_label_are_not_multiplied(labelled, computed, no_waits, monkeypatch):
    """Blocks of rows past the last label are skipped; one number is read, after the first block."""
    monkeypatch.setattr(exact_blas, "PRODUCT", Product(16, 512))
    case = make_case(100, 300, 24, bias=True, ignored=0.0).to(torch.float32)
    case.labels[torch.randperm(100)[labelled:]] = -100
    truth, backend = case.truth(), SmallBlocks(64, exact="blas")
    case.hidden_states[(case.labels < 0).nonzero()[:1, 0]] = float("nan")
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        with counted_launches() as found:
            got = case.run(backend=backend, filter_eps=0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, want in truth.items():
        assert (got[name] - want).norm() <= 1e-5 * want.norm(), name
    assert found.kernels["shares_kernel"] == computed
    assert found.waits["read_sent"] == 1


def test_one_block_of_rows_is_not_waited_for(no_waits):
    """Few rows are computed with those that have no label."""
    case = make_case(40, 300, 24, ignored=0.9).to(torch.float32)
    with counted_launches() as found:
        got = case.run(backend=TritonBackend(exact="blas"), filter_eps=0.0)
    assert_close(got, case.truth(), 1e-5)
    assert not found.waits["read_sent"]


def test_where_it_does_not_run():
    """fp16 and a smoothed softcap are refused by name, and take the other pass by "auto"."""
    both = {"softcap": 5.0, "label_smoothing": 0.1}
    for case in (make_case().to(torch.float16), make_case(**both).to(torch.float32)):
        with pytest.raises(ValueError, match=r"exact='blas': .*; use exact='auto' or 'triton'"):
            case.run(backend=TritonBackend(exact="blas"), filter_eps=0.0)
        case.run(backend=TritonBackend(), filter_eps=0.0)
    with pytest.raises(ValueError, match="exact='cublas': must be one of 'auto'"):
        TritonBackend(exact="cublas")
    assert blas_refusal(torch.bfloat16, torch.device("cpu"), LossOptions()) is None


def test_torch_without_such_products(monkeypatch):
    """Where torch cannot multiply bf16 into fp32, the pass is refused with the reason."""

    def old(*operands, out, add=False):
        raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")

    monkeypatch.setattr(exact_blas, "multiply", old)
    exact_blas.widens.cache_clear()
    try:
        refusal = blas_refusal(torch.bfloat16, torch.device("cpu"), LossOptions())
    finally:
        exact_blas.widens.cache_clear()
    assert "no product of torch.bfloat16 into fp32" in refusal


def test_rows_of_a_block_are_even():
    """Rows are cut into as few blocks as hold them, of about one size."""
    assert [_even(count, 2048) for count in (0, 1, 2048, 2049, 4096, 5000)] == [
        1, 16, 2048, 1040, 2048, 1680,
    ]  # fmt: skip
