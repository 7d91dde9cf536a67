"""Every option, precision and path of the Triton backend against the fp64 truth."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy, notices
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.triton import TritonBackend, refine
from str_kernels.engine.contract import Head, RowInputs
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms
from tests.backends.test_exact import OPTIONS
from tests.backends.test_routed import ALL_LIVE, clustered_case, index_of
from tests.oracle import Case, assert_close, make_case, relative_error

# fp32: rounding of sums over a few hundred terms; a softcap of 5 magnifies the logits' own by the
# steepness of tanh. 16 bits: probabilities are rounded to half an ulp (2^-9, 2^-12) and gradients
# once more; the weight's are differences of probabilities and labels, which magnifies that.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OF_WEIGHT = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6.5, torch.float16: 2.0**-9.5}


def check(case: Case, dtype: torch.dtype, **overrides) -> dict[str, torch.Tensor]:
    """Loss and all gradients within the tolerances of ``dtype``; returns them."""
    case = case.to(dtype)
    got, truth = case.run(**overrides), case.truth()
    weighted = {name: truth[name] for name in truth if name in ("weight", "bias")}
    rest = {name: truth[name] for name in truth if name not in weighted}
    assert_close({name: got[name] for name in rest}, rest, TOLERANCE[dtype])
    assert_close({name: got[name] for name in weighted}, weighted, OF_WEIGHT[dtype])
    return got


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_path(options, dtype, backend):
    """``filter_eps=0``: loss and gradients of hidden states, weight and bias, in every dtype."""
    check(make_case(**options), dtype, backend=backend, filter_eps=0.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_pair_live(options, backend):
    """All pairs refined, through a clustered order: nothing is lost between the stages."""
    case = clustered_case(40, 600, **options).to(torch.float32)
    overrides = {"backend": backend, "filter_eps": ALL_LIVE, "index": index_of(case)}
    check(case, torch.float32, **overrides)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filtered(options, dtype, backend):
    """At the default ε, with an index: the filter's own error stays below that of 16 bits."""
    case = clustered_case(40, 600, **options).to(dtype)
    check(case, dtype, backend=backend, filter_eps=DEFAULT_EPS, index=index_of(case))


@pytest.mark.parametrize("screen", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 20.0, "logit_scale": 0.7}])
def test_low_precision_screens_are_refined_away(screen, options, backend):
    """The error of a screened logit (bf16 2^-8, int8 1/127, fp8 2^-4) is left in dead mass alone.

    Dead tiles hold a few times ε = 2^-11 of the open mass between them: the loss is off by their
    mass times the screen's error, below 1e-3, and the gradient by at most twice their mass.
    """
    case = clustered_case(48, 900, 32, **options).to(torch.float32)
    named = None if screen == "bf16" else screen
    index = VocabularyIndex.build(case.weight, case.hidden_states, screen=named)
    hidden = case.hidden_states.clone().requires_grad_()
    case.weight.requires_grad_(False)
    from str_kernels import linear_cross_entropy

    loss = linear_cross_entropy(
        hidden,
        case.weight,
        case.labels,
        bias=case.bias,
        screen=screen,
        index=index,
        backend=backend,
        **case.settings,
    )
    loss.backward()
    truth = case.truth()
    assert relative_error(loss, truth["loss"]) < 1e-3
    assert relative_error(hidden.grad, truth["hidden_states"]) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "vocab", "dim"), [(1, 129, 16), (3, 128, 77), (130, 5, 24), (64, 1, 8), (300, 257, 1)]
)
@pytest.mark.parametrize("eps", [0.0, ALL_LIVE])
def test_ragged_shapes(n, vocab, dim, eps, backend):
    """Any N, V and D, multiples of nothing: one row, one token, one dimension, an odd D."""
    case = make_case(n, vocab, dim, bias=True, ignored=0.0).to(torch.float32)
    got, truth = case.run(backend=backend, filter_eps=eps), case.truth()
    for name, want in truth.items():
        # a gradient that cancels to nothing is compared with the size of its terms
        assert (got[name] - want).norm() <= 1e-5 * (want.norm() + 0.1), name


def test_non_contiguous_inputs(backend):
    """Strided hidden states and a transposed weight give what their copies give."""
    case = make_case(33, 200, 24).to(torch.float32)
    want = case.run(backend=backend)
    strided = Case(case.hidden_states.T.contiguous().T, case.weight.T.contiguous().T, case.labels)
    got = strided.run(backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("eps", [0.0, ALL_LIVE])
def test_a_strided_weight_is_copied_once(eps, backend, monkeypatch, caplog):
    """One copy in the forward and one in the backward of a trained head, and one warning."""
    case, copies = make_case(20, 300, 24).to(torch.float32), []
    real = torch.Tensor.contiguous

    def contiguous(tensor, *given, **named):
        if tensor.shape == (300, 24) and not tensor.is_contiguous():
            copies.append(tensor)
        return real(tensor, *given, **named)

    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    weight = case.weight.T.contiguous().T.requires_grad_()
    with caplog.at_level("WARNING", "str_kernels"):
        loss = linear_cross_entropy(
            case.hidden_states, weight, case.labels, backend=backend, filter_eps=eps
        )
        assert len(copies) == 1
        loss.backward()
    assert len(copies) == 2
    assert [record.getMessage().count("is copied once") for record in caplog.records] == [1]
    assert relative_error(weight.grad, case.truth()["weight"]) < 1e-5


@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
def test_no_labels(eps, backend):
    """Without any label loss and gradients are zero; with a constraint its columns remain."""
    case = make_case(20, 300, 24, ignored=1.0).to(torch.float32)
    got = case.run(backend=backend, filter_eps=eps)
    assert all((value == 0).all() for value in got.values())
    weights = torch.ones(20, dtype=torch.float64)
    case = make_case(20, 300, 24, ignored=1.0, k=5, reduction="sum")
    case.position_weights = weights
    check(case, torch.float32, backend=backend, filter_eps=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [5, 40, 640])
@pytest.mark.parametrize("eps", [0.0, ALL_LIVE])
def test_confident_rows_keep_their_gradient(scale, eps, dtype, backend):
    """Logits of 5 to 640: rows that are nearly right keep their gradient, in fp16 as well.

    Its size follows the logits' rounding, ``scale · 2^-22``; a probability of 1e-7, which fp16
    cannot hold, is rounded relative to its tile's largest and so to 2^-12.
    """
    case = make_case(32, 200, 16, ignored=0.0)
    case.hidden_states /= case.hidden_states.norm(dim=-1, keepdim=True)
    case.weight *= scale / case.weight.norm(dim=-1).max()
    case.labels = (case.hidden_states @ case.weight.T).argmax(-1)
    # a mean would put the whole gradient among fp16's smallest numbers
    case.settings["reduction"] = "sum"
    case = case.to(dtype)
    got, truth = case.run(backend=backend, filter_eps=eps), case.truth()
    tolerance = max(TOLERANCE[dtype], scale * 2.0**-19)
    assert relative_error(got["hidden_states"], truth["hidden_states"]) < tolerance
    assert relative_error(got["loss"], truth["loss"]) < max(1e-5, scale * 2.0**-19)


@pytest.mark.parametrize("kind", ["one tile", "equal logits", "huge logit", "label far away"])
def test_adversarial_routing(kind, backend):
    """All rows in one tile, no pair above ε, one huge logit, an improbable label: still right."""
    case = clustered_case(40, 600, ignored=0.0)
    if kind == "one tile":
        case.hidden_states = case.weight[:1].expand(40, -1).contiguous() * 3
    elif kind == "equal logits":
        case.hidden_states = torch.zeros_like(case.hidden_states)
    elif kind == "huge logit":
        case.hidden_states[:, 0], case.weight[7, 0] = 30.0, 30.0
    else:
        case.labels = (case.hidden_states @ case.weight.T).argmin(-1)
    case = case.to(torch.float32)
    got = case.run(backend=backend, filter_eps=0.9 if kind == "equal logits" else DEFAULT_EPS)
    truth = case.truth()
    for name in ("loss", "hidden_states"):
        assert (got[name] - truth[name]).norm() <= 0.02 * (truth[name].norm() + 1e-6), name


@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_show_and_stay_alone(value, eps, backend):
    """NaN or inf in one row's hidden states breaks that row's loss, and no other's."""
    case = make_case(20, 300, 24, ignored=0.0, reduction="none").to(torch.float32)
    want = case.run(backend=backend, filter_eps=eps)["loss"]
    case.hidden_states[3, 2] = value
    got = case.run(backend=backend, filter_eps=eps)["loss"]
    assert not got[3].isfinite()
    keep = torch.arange(20) != 3
    torch.testing.assert_close(got[keep], want[keep])


def test_tiles_without_mass(backend):
    """Tokens masked with a bias of -inf have no probability, and no gradient but zero."""
    case = make_case(20, 520, 24, bias=True).to(torch.float32)
    case.bias[100:400] = float("-inf")
    case.labels[case.labels >= 0] %= 100
    for eps in (0.0, DEFAULT_EPS):
        got, truth = case.run(backend=backend, filter_eps=eps), case.truth()
        assert relative_error(got["loss"], truth["loss"]) < 1e-5
        assert relative_error(got["hidden_states"], truth["hidden_states"]) < 5e-3
        assert (got["weight"][100:400] == 0).all()


def test_entropy_and_statistics(backend):
    """The exact path's entropy, accuracy and log-sum-exp are the truth's."""
    check_statistics(backend, 8.0)


def check_statistics(backend, softcap: float | None) -> None:
    """Entropy, log-sum-exp and accuracy of the exact path are those of the oracle."""
    case, options = make_case(40, 300, 24, bias=True), LossOptions(softcap=softcap)

    def run(case, chosen):
        head, inputs = Head(case.hidden_states, case.weight, case.bias), RowInputs(case.labels)
        return row_terms(head, inputs, options, backend=chosen, entropy=True).statistics

    got, want = run(case.to(torch.float32), backend), run(case, "dense")
    labelled = case.labels >= 0
    for name in ("entropy", "lse"):
        error = relative_error(getattr(got, name)[labelled], getattr(want, name)[labelled])
        assert error < 1e-5, name
    assert torch.equal(got.correct, want.correct)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
def test_blocks_do_not_matter(eps):
    """Under the smallest byte budget (blocks of rows, groups of tiles) the result is the same."""
    case = clustered_case(300, 600, k=5, bias=True).to(torch.float32)
    index = index_of(case)
    want = case.run(backend=TritonBackend(), filter_eps=eps, index=index)
    got = case.run(backend=TritonBackend(1), filter_eps=eps, index=index)
    assert_close(got, want, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_deterministic_and_no_uninitialised_memory(atomic, budget, monkeypatch):
    """Torch's deterministic mode fills new memory with NaN; none shows, and results repeat bitwise.

    ``atomic`` keeps the atomics on in that mode, to poison their memory as well.
    """
    case = clustered_case(48, 600, bias=True, softcap=9.0).to(torch.float32)
    index, chosen = index_of(case), TritonBackend(budget)
    torch.use_deterministic_algorithms(True)
    try:
        if atomic:
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        for eps in (0.0, DEFAULT_EPS):
            first = case.run(backend=chosen, filter_eps=eps, index=index)
            again = case.run(backend=chosen, filter_eps=eps, index=index)
            torch.testing.assert_close(first, again, rtol=0, atol=0)
            assert_close(first, case.truth(), 5e-3 if eps else 1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_planted_fault_is_seen(backend, monkeypatch):
    """Labels taken for places in the order (as if there were no index) exceed every tolerance."""
    case = clustered_case(40, 600).to(torch.float32)
    places = refine.label_places
    monkeypatch.setattr(refine, "label_places", lambda block: places(block._replace(tiles=None)))
    with pytest.raises(AssertionError):
        check(case, torch.float32, backend=backend, filter_eps=ALL_LIVE, index=index_of(case))


def test_double_precision_is_refused(backend):
    """fp64 operands are sent to the torch backend by a clear error."""
    with pytest.raises(ValueError, match="fp64"):
        make_case().run(backend=backend)


def test_autocast_casts_the_weight_in_registers(backend):
    """Under autocast an fp32 weight meets bf16 hidden states, as in ``F.linear``."""
    from str_kernels import linear_cross_entropy

    case = make_case(20, 300, 24).to(torch.float32)
    hidden = case.hidden_states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=backend)
    loss.backward()
    assert relative_error(loss, case.to(torch.bfloat16).truth()["loss"]) < 1e-5
    assert relative_error(hidden.grad, case.truth()["hidden_states"]) < 0.02


def test_a_compiled_model_runs_the_kernels_as_they_are():
    """``torch.compile`` around a head and its loss gives the same loss and gradients."""
    from str_kernels import linear_cross_entropy

    case = clustered_case(24, 300).to(torch.float32)
    layer = torch.nn.Linear(24, 24)

    def loss(hidden):
        mixed = layer(hidden) + hidden
        return linear_cross_entropy(
            mixed, case.weight, case.labels, backend="triton", filter_eps=DEFAULT_EPS
        )

    want = torch.autograd.grad(loss(case.hidden_states), layer.weight)[0]
    compiled = torch.compile(loss, backend="eager")
    got = torch.autograd.grad(compiled(case.hidden_states), layer.weight)[0]
    torch.testing.assert_close(got, want)


def test_a_bias_alone(backend):
    """A trained bias under a frozen weight that is wider than a block of columns."""
    case = make_case(3, 300, 130, bias=True, ignored=0.0).to(torch.float32)
    bias = case.bias.detach().clone().requires_grad_()
    inputs = (case.hidden_states.detach(), case.weight.detach(), case.labels)
    linear_cross_entropy(*inputs, bias=bias, filter_eps=0.0, backend=backend).backward()
    logits = inputs[0].double() @ inputs[1].double().T + bias.detach().double()
    want = torch.softmax(logits, -1)
    want[torch.arange(3), case.labels] -= 1
    torch.testing.assert_close(bias.grad.double(), want.mean(0), rtol=1e-5, atol=1e-7)
