"""On a real GPU: the same promises as in the interpreter, at sizes that only a GPU reaches.

Run them where there is a GPU: ``pytest -m gpu tests/triton/test_gpu.py``.
"""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.selection import DEFAULT_EPS, select_backend
from str_kernels.backends.triton.quantise import quantised
from str_kernels.quantise import EIGHT_BITS, quantise_rows
from tests.backends.test_exact import OPTIONS
from tests.backends.test_routed import ALL_LIVE, clustered_case
from tests.oracle import Case, make_case, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
# As in tests/triton/interpreted: rounding of the operands; tf32 needs torch's own setting.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# fp16 also has no room for the smallest gradients.
OF_WEIGHT = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6.5, torch.float16: 2.0**-9}
CUDA = torch.device("cuda")


def on_gpu(case: Case) -> Case:
    """The same numbers on the device."""
    names = ("hidden_states", "weight", "labels", "bias", "reference", "position_weights")
    moved = [getattr(case, name) for name in names]
    return Case(*(None if x is None else x.cuda() for x in moved), case.settings)


def check(case: Case, cost: dict[str, float] | None = None, **overrides) -> None:
    """Loss and gradients within the tolerances of the case's dtype, and what a filter may cost."""
    dtype = case.hidden_states.dtype
    got, truth = case.run(backend="triton", **overrides), case.truth()
    for name, want in truth.items():
        limit = OF_WEIGHT[dtype] if name in ("weight", "bias") else TOLERANCE[dtype]
        limit += 0.0 if cost is None else 1.1 * cost[name]
        assert relative_error(got[name], want) <= limit, (name, relative_error(got[name], want))


def cost_of_filter(case: Case, **overrides) -> dict[str, float]:
    """Its own error by name, in fp32 on the torch backend; large where a softcap flattens."""
    plain = case.to(torch.float32)
    got, truth = plain.run(backend="torch", **overrides), plain.truth()
    return {name: relative_error(got[name], want) for name, want in truth.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, dtype):
    """Exact path, every pair live, and filtered: all options and dtypes against fp64."""
    case = on_gpu(clustered_case(257, 3001, 72, **options).to(dtype))
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    check(case, filter_eps=0.0)
    check(case, filter_eps=ALL_LIVE, index=index)
    filtered = {"filter_eps": DEFAULT_EPS, "index": index}
    check(case, cost_of_filter(case, **filtered), **filtered)


@pytest.mark.parametrize("filter_eps", [0.0, ALL_LIVE])
def test_a_weight_in_fp32_under_autocast(filter_eps):
    """Its tiles take twice the shared memory: the table's sizes would not fit everywhere."""
    case = on_gpu(clustered_case(300, 3001, 1024).to(torch.bfloat16))
    plain = case.run(backend="triton", filter_eps=filter_eps)
    case.weight = case.weight.float()
    case.hidden_states = case.hidden_states.float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        wide = case.run(backend="triton", filter_eps=filter_eps)
    assert relative_error(wide["loss"], plain["loss"]) < 1e-5
    assert relative_error(wide["hidden_states"], plain["hidden_states"]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("screen", ["bf16", "int8", "fp8"])
def test_screens(screen):
    """Low-precision screens are refined away; a chip without fp8 refuses it by name."""
    case = on_gpu(clustered_case(512, 4000, 128).to(torch.bfloat16))
    named = None if screen == "bf16" else screen
    index = VocabularyIndex.build(case.weight, case.hidden_states, screen=named)
    hidden = case.hidden_states.clone().requires_grad_()

    def run():
        return linear_cross_entropy(hidden, case.weight, case.labels, screen=screen, index=index)

    backend = select_backend("triton", hidden.device)[0]
    if backend.refuses(screen, hidden.dtype, hidden.device):
        with pytest.raises(ValueError, match="screen='fp8'"):
            run()
        return
    loss = run()
    loss.backward()
    truth = case.truth()
    assert relative_error(loss, truth["loss"]) < 1e-3
    assert relative_error(hidden.grad, truth["hidden_states"]) < 1e-2


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantised_rows(name):
    """Through an order, columns scaled, as torch rounds but where a product's last bit decides."""
    if select_backend("triton", CUDA)[0].refuses(name, torch.bfloat16, CUDA):
        pytest.skip("this GPU has no fp8")
    rows = torch.randn(3001, 1200, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(3001, device="cuda")
    columns = torch.rand(1200, device="cuda") + 0.1
    eight, scales = quantised(
        rows, EIGHT_BITS[name], order=order, places=range(512, 3001), columns=columns
    )
    want, want_scales = quantise_rows(rows[order[512:]], EIGHT_BITS[name], columns)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0.0)
    differ = (eight.float() - want.float()).abs()
    assert (differ > 0).float().mean() < 0.02
    assert (differ <= (want.float().abs() / 8).clamp(min=1.0)).all()


def test_offsets_beyond_31_bits():
    """A head of more than 2³¹ elements: its last row is read and written at its own place."""
    vocab, dim = 530_000, 4096
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free device memory")
    weight = torch.zeros(vocab, dim, dtype=torch.bfloat16, device="cuda")
    weight[-1] = weight[1] = 0.25
    weight.requires_grad_()
    hidden = torch.ones(64, dim, dtype=torch.bfloat16, device="cuda") / 64
    labels = torch.full((64,), vocab - 1, device="cuda")
    loss = linear_cross_entropy(hidden, weight, labels, filter_eps=DEFAULT_EPS)
    loss.backward()
    # logits: 16 for two tokens, 0 for the others
    want = torch.log(2 + (vocab - 2) * torch.exp(torch.tensor(-16.0))).item()
    assert loss.item() == pytest.approx(want, rel=1e-4)
    assert weight.grad[-1].sum() < 0 < weight.grad[1].sum()


def test_deterministic_repeats_bitwise():
    """In torch's deterministic mode two runs give the same bits; without, the same to rounding."""
    case = on_gpu(clustered_case(1024, 4000, 128).to(torch.bfloat16))
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    arguments = {"backend": "triton", "filter_eps": DEFAULT_EPS, "index": index}
    loose = case.run(**arguments)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [case.run(**arguments) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name in loose:
        assert torch.equal(runs[0][name], runs[1][name]), name
        assert relative_error(loose[name], runs[0][name]) < 2.0**-8, name


def test_forward_does_not_wait_for_the_device():
    """Screen, route and refine enqueue without a host synchronisation."""
    from str_kernels.backends.triton import TritonBackend
    from str_kernels.engine.contract import Block, Head, Tiles, Wanted
    from str_kernels.options import LossOptions
    from str_kernels.vocabulary import tile_means

    case = on_gpu(make_case(512, 4000, 128, ignored=0.0).to(torch.bfloat16))
    backend = TritonBackend()
    head = Head(case.hidden_states, case.weight, None)
    tiles = Tiles(None, None, tile_means(case.weight, None))
    block = Block(head, case.labels, tiles, LossOptions())

    def stages():
        masses = backend.screen(block, "exact")
        work = backend.route(block, masses, DEFAULT_EPS)
        return backend.refine(block, work, Wanted(hidden=True, masses=False, entropy=False))

    stages()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stages()
    finally:
        torch.cuda.set_sync_debug_mode("default")
