"""Matrix products: in the dtype that a CPU is fast in, by the library that is."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.engine.contract import Block, Head, Tiles
from str_kernels.engine.products import dead_product, product, product_dtype
from str_kernels.options import TILE, LossOptions
from str_kernels.vocabulary import tile_means
from tests.backends.test_routed import absolute, clustered_case
from tests.cpus import set_cpu
from tests.oracle import relative_error

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addmm_", "_linear_pointwise"}


class ProductDtypes(TorchDispatchMode):
    """Collects the dtypes of every matrix product's operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in PRODUCTS:
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def step(dtype, *, constrained: bool, trainable: bool, **settings) -> set[torch.dtype]:
    """Forward and backward; which dtypes were multiplied."""
    case = clustered_case(**({"k": 4, "kind": "logprob"} if constrained else {})).to(dtype)
    hidden = case.hidden_states.requires_grad_()
    weight = case.weight.requires_grad_(trainable)
    if settings.pop("indexed", False):
        settings["index"] = VocabularyIndex.build(weight, hidden)
    with ProductDtypes() as collected:
        linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            bias=case.bias,
            safety=case.settings.get("safety"),
            reference=case.reference,
            backend="torch",
            **settings,
        ).backward()
    return collected.seen


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "settings", [{"filter_eps": 0.0}, {"indexed": True}, {"screen": "bf16"}], ids=str
)
def test_no_product_in_16_bit(monkeypatch, dtype, constrained, trainable, settings):
    """Exact, filtered and screened, frozen and trained, with and without the constraint."""
    set_cpu(monkeypatch)
    assert step(dtype, constrained=constrained, trainable=trainable, **settings) == {torch.float32}


def test_products_in_bf16_where_the_cpu_has_them(monkeypatch):
    """The collector sees them: the filter's screen and dead pairs use the instructions."""
    set_cpu(monkeypatch, bf16=True)
    seen = step(torch.bfloat16, constrained=False, trainable=False, indexed=True)
    assert torch.bfloat16 in seen


@pytest.mark.parametrize("has", [True, False])
def test_the_dtype_of_a_product(monkeypatch, has):
    """fp16 is never multiplied as such, bf16 with instructions only, fp32 and fp64 always."""
    set_cpu(monkeypatch, bf16=has)
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    want = [torch.float64, torch.float32, torch.bfloat16 if has else torch.float32, torch.float32]
    assert [product_dtype(dtype, CPU) for dtype in dtypes] == want


def test_the_bf16_screen_rounds_alike_with_and_without_instructions(monkeypatch):
    """Asked for by name it rounds the operands everywhere (2⁻⁹); only the product's dtype differs.

    Logits of size 5 move by some hundredths, so do log-masses; rounded once more they do again.
    """
    case = clustered_case().to(torch.float32)
    head = Head(case.hidden_states, case.weight, case.bias)
    tiles = Tiles(None, None, tile_means(case.weight, None))

    def log_mass(screen: str) -> torch.Tensor:
        return absolute(screen_tiles(Block(head, case.labels, tiles, LossOptions()), screen, TILE))

    set_cpu(monkeypatch)
    emulated, exact = log_mass("bf16"), log_mass("exact")
    assert 1e-4 < (emulated - exact).abs().max() < 0.1
    set_cpu(monkeypatch, bf16=True)
    assert (log_mass("bf16") - emulated).abs().max() < 0.1


@pytest.mark.parametrize("operands", HALVES, ids=str)
def test_dead_product_without_instructions_is_fp32(monkeypatch, operands):
    """In the dtype of its left operand, with no rounding to bf16 (2⁻⁹ a number)."""
    g = torch.Generator().manual_seed(0)
    left = torch.rand(64, 32, generator=g)
    right = torch.rand(32, 16, generator=g).to(operands)
    truth = left.double() @ right.double()
    set_cpu(monkeypatch)
    assert relative_error(dead_product(left, right, operands), truth) < 1e-6
    set_cpu(monkeypatch, bf16=True)
    assert relative_error(dead_product(left, right, operands), truth) > 1e-4


@pytest.fixture
def by_onednn(monkeypatch):
    """As on an AMD CPU with AVX-512, whatever this one is."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    set_cpu(monkeypatch, onednn_fp32=True)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 1, 1), (1, 640, 128), (3, 7, 130), (65, 33, 5), (0, 4, 3)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_onednn_multiplies_alike(by_onednn, rows, inner, columns, turned):
    """By oneDNN as by MKL, the right side as it lies or as a transposed view."""
    g = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=g)
    right = torch.randn(columns, inner, generator=g).T
    right = right if turned else right.contiguous()
    got = product(left, right)
    assert got.shape == (rows, columns)
    torch.testing.assert_close(got.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_onednn_keeps_what_is_not_finite(by_onednn):
    """NaN and inf come out where they went in."""
    left, right = torch.ones(2, 3), torch.ones(3, 4)
    left[0, 0], right[1, 2] = float("nan"), float("inf")
    torch.testing.assert_close(product(left, right), left @ right, equal_nan=True)


@pytest.mark.parametrize("settings", [{"filter_eps": 0.0}, {"filter_eps": 2.0**-11}], ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_a_head_by_onednn_is_right(by_onednn, settings, trainable):
    """Every product of a step is made by it, and the oracle's loss and gradients come out."""
    case = clustered_case(bias=True).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    got = case.run(index=index, **settings)
    bound = 1e-5 if settings["filter_eps"] == 0.0 else 0.01
    assert relative_error(got["loss"], case.truth()["loss"]) < bound
    assert relative_error(got["hidden_states"], case.truth()["hidden_states"]) < bound
    seen = step(torch.float32, constrained=False, trainable=trainable, indexed=True)
    assert seen == {torch.float32}
