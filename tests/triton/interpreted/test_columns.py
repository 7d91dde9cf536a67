"""The logits of label, anchors and safety tokens, beside plain fp64 products."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint
from str_kernels.backends.triton import TritonBackend
from str_kernels.engine.contract import Block, Head
from str_kernels.engine.forward import tiles_of
from str_kernels.engine.logits import exact_columns
from str_kernels.options import LossOptions
from str_kernels.oracle import dense_logits

ROWS, VOCAB, DIM = 41, 300, 75
NAN = float("nan")


def block_of(dtype, count, *, routed=True, bias=False, weight_dtype=None, vocab=VOCAB, **options):
    """More rows than a program's and D no multiple of a step; labels among the safety tokens."""
    g = torch.Generator().manual_seed(count)
    weight_dtype = weight_dtype or dtype

    def random(*shape):
        return torch.randn(*shape, generator=g)

    weight = random(vocab, DIM).to(weight_dtype)
    head = Head(
        random(ROWS, DIM).to(dtype), weight, random(vocab).to(weight_dtype) if bias else None
    )
    labels = torch.randint(0, vocab, (ROWS,), generator=g)
    labels[::5] = -1
    safety = None
    if count:
        ids = torch.randperm(vocab, generator=g)[:count]
        labels[1], labels[2] = ids[0], ids[-1]
        safety = SafetyConstraint(ids.tolist(), kind="mse")
    tiles = tiles_of(weight, None, fresh=True, operands=dtype) if routed else None
    return Block(head, labels, tiles, LossOptions(safety=safety, **options))


def truth_of(block):
    """Label, anchor, safety and difference in fp64, from the operands as they are rounded."""
    head, labels, tiles, options = block[:4]
    weight = head.weight.to(head.hidden_states.dtype)
    bias = None if head.bias is None else head.bias.double()
    z = dense_logits(head.hidden_states.double(), weight.double(), bias, options)
    label = z.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, NAN)
    ids = [] if options.safety is None else list(options.safety.token_ids)
    safety = z[:, ids] if ids else None
    anchor = None
    if tiles is not None:
        vocab = len(weight)
        looked_at = z[:, [place * vocab // 8 for place in range(8)] + ids[:1]]
        anchor = torch.fmax(looked_at.amax(-1), label)
    difference = z.mean(-1) - label if tiles is not None and options.label_smoothing else None
    return label, anchor, safety, difference


def check(block, needed=None, tolerance=2e-5):
    """The kernel's and torch's against fp64; a row that is not needed has NaN, and 0 as anchor.

    All but the safety logits are asked for in another order, and of a few rows.
    """
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:5]):
        for got in (
            TritonBackend().columns(block, needed, rows),
            exact_columns(block, needed, rows),
        ):
            _check(got, block, needed, rows, tolerance)


def _check(got, block, needed, rows, tolerance):
    fills = {"label": NAN, "anchor": 0.0, "safety": NAN, "difference": NAN}
    for mine, want, (name, fill) in zip(got, truth_of(block), fills.items(), strict=True):
        assert (mine is None) == (want is None)
        if want is None:
            continue
        want = want.clone()
        if needed is not None:
            want[~needed] = fill
        if rows is not None and name != "safety":
            want = want[rows]
        assert mine.dtype == torch.float32
        torch.testing.assert_close(
            mine.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 56, 64, 65])
def test_routed(dtype, count):
    """Fewer, as many and more tokens than a program takes, with their anchors."""
    check(block_of(dtype, count))


@pytest.mark.parametrize("count", [0, 64])
def test_exact_path(count):
    """No anchors, and without a constraint no tokens at all."""
    check(block_of(torch.bfloat16, count, routed=False))


@pytest.mark.parametrize("softcap", [5.0, 1000.0])
def test_every_option(softcap):
    """Bias, scale and a softcap below and far above the logits."""
    check(block_of(torch.float32, 3, bias=True, softcap=softcap, logit_scale=0.7))


@pytest.mark.parametrize("bias", [False, True])
def test_label_smoothing(bias):
    """The mean of the logits relative to the label's."""
    options = {"label_smoothing": 0.1, "logit_scale": 0.7}
    check(block_of(torch.float32, 3, bias=bias, **options), tolerance=1e-4)


def test_rows_that_are_not_needed_do_not_count():
    """Not even where they hold NaN; a whole program of them ends before it reads anything."""
    block = block_of(torch.float32, 9)
    needed = block.labels >= 0
    needed[32:] = False
    block.head.hidden_states[~needed] = NAN
    check(block, needed)


def test_a_weight_in_fp32_is_rounded_as_autocast_does():
    """Operands of 16 bits and W in fp32."""
    check(block_of(torch.bfloat16, 9, weight_dtype=torch.float32))


@pytest.mark.slow
def test_a_thousand_tokens():
    """As many as a constraint may have."""
    check(block_of(torch.bfloat16, 1024, vocab=1100))


def test_large_masked_and_infinite_logits():
    """An anchor is finite and large enough; labels and safety logits are as they are."""
    block = block_of(torch.float32, 9, bias=True)
    bias = block.head.bias
    anchors = [place * VOCAB // 8 for place in range(8)]
    bias[anchors] = -1e9
    bias[anchors[3]] = float("inf")
    bias[block.options.safety.token_ids[4]] = -float("inf")
    mine, torchs = TritonBackend().columns(block, None), exact_columns(block, None)
    assert mine.anchor.isfinite().all()
    assert torch.equal(mine.anchor, torch.zeros(ROWS))
    torch.testing.assert_close(mine.safety, torchs.safety)
    torch.testing.assert_close(mine.anchor, torchs.anchor)
    bias[anchors[3]] = 16384.0
    check(block)


def test_strided_operands():
    """Every second row and column."""
    block = block_of(torch.float32, 9)
    wide = torch.zeros(2 * ROWS, 2 * DIM)
    wide[::2, ::2] = block.head.hidden_states
    strided = block._replace(head=block.head._replace(hidden_states=wide[::2, ::2]))
    both = (TritonBackend().columns(given, None) for given in (strided, block))
    for one, other in zip(*both, strict=True):
        assert one is None or torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
