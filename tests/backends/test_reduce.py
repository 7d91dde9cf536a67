"""The two ways to reduce a block of logits, and the compiler that one of them needs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from str_kernels import VocabularyIndex, notices
from str_kernels.backends.torch import compiled as compiling
from str_kernels.backends.torch import screen as screening
from str_kernels.backends.torch.compiled import compiled
from str_kernels.backends.torch.reduce import (
    FusedReduction,
    Products,
    _log_masses,
    fused_reduction,
    reduce_eagerly,
)
from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.engine.contract import Block, Head, TileMasses, Tiles
from str_kernels.options import TILE, LossOptions
from tests.backends.test_routed import clustered_case

TILES = 3


def quantised_products(rows: int = 5) -> tuple[Products, torch.Tensor]:
    """Integers with scales, and the logits that they stand for in fp64."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(-9000, 9000, (rows, TILES * TILE), generator=g, dtype=torch.int32)
    made = Products(
        numbers, torch.rand(TILES * TILE, generator=g), 2e-3 * torch.rand(rows, 1, generator=g)
    )
    return made, numbers.double() * made.column_scales.double() * made.row_scales.double()


def log_masses(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.double().unflatten(1, (-1, TILE)), -1)


def empty(rows: int, tiles: int, anchor: float = 0.0) -> TileMasses:
    return TileMasses(torch.empty(rows, tiles), None, torch.full((rows,), anchor))


def ready(shift: torch.Tensor, logit_scale: float = 1.0) -> FusedReduction:
    """The loop as torch runs it uncompiled, after a first block."""
    fused = FusedReduction(_log_masses, logit_scale)
    fused.see(shift)
    return fused


@pytest.mark.parametrize("anchor", [0.0, 2.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
def test_both_ways_are_right(logit_scale, anchor):
    """Of quantised products: fp64's log-masses, scaled."""
    made, logits = quantised_products()
    want = log_masses(logit_scale * logits) - anchor
    fused, eager = empty(5, TILES, anchor), empty(5, TILES, anchor)
    assert ready(want.float()[:, :1], logit_scale)(made, fused)
    reduce_eagerly(made, None, LossOptions(logit_scale=logit_scale), eager)
    torch.testing.assert_close(fused.log_mass.double(), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(eager.log_mass.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("offset", [16384.0, -16384.0, 1e6])
def test_an_offset_that_the_anchor_has_costs_no_digit(offset):
    """Logits with few decimals, exact in fp32: both ways are as right as without the offset."""
    g = torch.Generator().manual_seed(1)
    logits = offset + torch.randint(-160, 160, (4, TILES * TILE), generator=g).float() / 16
    want = log_masses(logits.double() - offset)
    fused, eager = empty(4, TILES, offset + 1.0), empty(4, TILES, offset + 1.0)
    assert ready(want.float()[:, :1])(Products(logits), fused)
    reduce_eagerly(Products(logits), None, LossOptions(), eager)
    for got in (fused, eager):
        torch.testing.assert_close(got.log_mass.double() + 1.0, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_floats(dtype):
    """Without scales: the products are the logits."""
    g = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(4, TILES * TILE, generator=g)).to(dtype)
    got, want = empty(4, TILES), log_masses(logits)
    assert ready(torch.zeros(4, 1))(Products(logits.clone()), got)
    torch.testing.assert_close(got.log_mass.double(), want, rtol=0, atol=2e-5)


def test_the_shift_is_the_largest_so_far():
    """Block after block it rises, so that growing logits do not overflow; it never falls."""
    fused, out = FusedReduction(_log_masses, 1.0), empty(1, 1)
    for level in (0.0, 80.0, 160.0, 20.0):
        products = Products(torch.full((1, TILE), level))
        if fused.shift is not None:
            assert fused(products, out)
            want = level + torch.tensor(float(TILE)).log()
            if level == 20.0:  # exp(-140) is no number of fp32
                want = torch.tensor(-float("inf"))
            torch.testing.assert_close(out.log_mass[0, 0], want)
        else:
            assert not fused(products, out)
            reduce_eagerly(products, None, LossOptions(), out)
        fused.see(out.log_mass)


@pytest.mark.parametrize("level", [100.0, float("inf"), float("nan")])
def test_what_overflows_is_left_to_the_other_way(level):
    """100 nats above the shift, inf and NaN: seen, and nothing written."""
    out = empty(1, 1)
    out.log_mass[:] = 7.0
    assert not ready(torch.zeros(1, 1))(Products(torch.full((1, TILE), level)), out)
    assert out.log_mass.item() == 7.0


def test_a_ragged_tile_is_left_to_the_other_way():
    assert not ready(torch.zeros(1, 1))(Products(torch.zeros(1, TILE + 5)), empty(1, 2))


@pytest.mark.parametrize("level", [-60.0, -100.0, -900.0, -1e9])
def test_a_first_token_far_below_the_others(level):
    """The mass is found by the first token's log-probability, unless that has too few digits."""
    g = torch.Generator().manual_seed(1)
    logits, out = torch.randn(4, TILES * TILE, generator=g), empty(4, TILES)
    logits[:, ::TILE] = level
    reduce_eagerly(Products(logits.clone()), None, LossOptions(), out)
    torch.testing.assert_close(out.log_mass.double(), log_masses(logits), rtol=0, atol=1e-5)


def test_a_softcap_is_left_to_the_other_way():
    assert fused_reduction(LossOptions(softcap=30.0)) is None


CompilerFailed = torch._dynamo.exc.TorchDynamoException


def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_no_compiler_is_said_once(monkeypatch, caplog):
    """A toolchain that is missing or broken costs one attempt and one line."""

    def broken(function, **options):
        def call(*args):
            raise CompilerFailed("no C++ compiler\nwith many more lines")

        return call

    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.INFO, logger="str_kernels"):
        assert compiled(twice, torch.ones(2)) is None
        assert compiled(twice, torch.ones(2)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "str_kernels: compiles its loops for this CPU, some seconds once in a process",
        "str_kernels: torch.compile failed, loops run as torch calls (no C++ compiler)",
    ]


def test_a_compiler_that_fails_later_costs_no_step(monkeypatch):
    """Another dtype is compiled anew: where that fails the function runs as it is, then never."""

    def fails_on_fp64(function, **options):
        def call(x):
            if x.dtype == torch.float64:
                raise CompilerFailed("disk full")
            return function(x)

        return call

    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(torch, "compile", fails_on_fp64)
    loop = compiled(twice, torch.ones(2))
    assert loop(torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 2.0]
    assert compiled(twice, torch.ones(2)) is None


def failing_with(error):
    """A ``torch.compile`` whose backend raises this error."""

    def compile_(function, **options):
        def backend(graph, inputs):
            raise error

        return compiling_for_real(function, backend=backend)

    compiling_for_real = torch.compile
    return compile_


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")], ids=repr)
def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch, error):
    """In the compiler, which wraps the error, and in the compiled loop, which does not."""
    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(torch, "compile", failing_with(error))
    with pytest.raises(type(error), match="full"):
        compiled(twice, torch.ones(2))

    def loop(x):
        raise error

    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(torch, "compile", lambda function, **options: loop)
    with pytest.raises(type(error), match="full"):
        compiled(twice, torch.ones(2))


def test_a_compiler_that_really_fails(monkeypatch):
    """What its backend raises arrives inside an error of dynamo's."""
    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(torch, "compile", failing_with(RuntimeError("no compiler")))
    assert compiled(twice, torch.ones(2)) is None


def test_a_fault_of_the_loop_is_raised(monkeypatch):
    """An error that is not the compiler's is not taken for one of its own."""

    def loop(x):
        raise ValueError("wrong shape")

    monkeypatch.setattr(compiling, "_made", {})
    monkeypatch.setattr(torch, "compile", lambda function, **options: loop)
    with pytest.raises(ValueError, match="wrong shape"):
        compiled(twice, torch.ones(2))


def test_a_disabled_dynamo_compiles_nothing():
    """``TORCHDYNAMO_DISABLE=1`` would run the function as it is, many times slower."""
    with torch._dynamo.config.patch(disable=True):
        assert compiled(twice, torch.ones(2)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("screen", "dtype"),
    [
        ("int8", torch.float32),
        ("int8", torch.bfloat16),
        ("bf16", torch.float32),
        ("exact", torch.float32),
        ("exact", torch.bfloat16),
    ],
    ids=str,
)
def test_a_compiled_screen_equals_the_other(monkeypatch, screen, dtype):
    """The whole screen, its loops compiled, at several block widths and numbers of threads."""
    if fused_reduction(LossOptions()) is None:
        pytest.skip("torch.compile does not work here")
    case = clustered_case(70, 1100, 33).to(dtype)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    tiles = Tiles(index.order, index.inverse, index.mean_rows)
    threads = torch.get_num_threads()
    try:
        for rows, columns, count in ((70, TILE, 1), (33, 4 * TILE, 2), (1, 2 * TILE, 1)):
            torch.set_num_threads(count)
            head = Head(case.hidden_states[:rows], case.weight, None)
            options = LossOptions(logit_scale=0.7)
            monkeypatch.setattr(screening, "COMPILED_FROM", 1 << 60)
            block = Block(head, case.labels[:rows], tiles, options)
            eager = screen_tiles(block, screen, columns).log_mass
            monkeypatch.setattr(screening, "COMPILED_FROM", 1)
            fused = screen_tiles(block, screen, columns).log_mass
            torch.testing.assert_close(fused, eager, rtol=0, atol=3e-5)
    finally:
        torch.set_num_threads(threads)


LOOP = """
import torch
from str_kernels.backends.torch.compiled import compiled
from str_kernels.backends.torch.screen import _eight_bits
rows, columns = torch.linspace(-1, 2, 4096).view(64, 64), torch.linspace(0.5, 1, 64)
loop = compiled(_eight_bits, torch.ones(2, 16), torch.ones(16))
assert loop is not None
got, want = loop(rows, columns), _eight_bits(rows, columns)
print((got[0].int() - want[0].int()).abs().max().item(), (got[1] / want[1] - 1).abs().max().item())
"""


@pytest.mark.slow
def test_cpus_may_share_the_folder_of_compiled_code(tmp_path):
    """What one with wide vectors has compiled is not run by one with narrow ones, which is wrong:
    the rows of an 8-bit screen are the same on both, up to a rounding.
    """
    if fused_reduction(LossOptions()) is None:
        pytest.skip("torch.compile does not work here")
    kept = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for setting in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        done = subprocess.run(
            [sys.executable, "-c", LOOP], env={**kept, **setting}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        of_numbers, of_scales = map(float, done.stdout.split())
        assert of_numbers <= 1
        assert of_scales < 1e-6
