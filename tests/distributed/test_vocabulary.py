"""A head whose rows lie on several processes: the loss and every gradient are those of one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.traffic import Loss
from str_kernels import SafetyConstraint, VocabularyIndex, linear_cross_entropy
from tests.distributed.pool import Pool
from tests.distributed.vocabulary import apart, counted, cut, losses, of_dtensor, own, unlike, whole
from tests.oracle import Case, assert_close, filtered_truth, make_case

pytestmark = pytest.mark.one_in(4)

N, VOCAB, DIM = 24, 501, 16
OPTIONS = {
    "plain": {},
    "bias, scale and softcap": {"bias": True, "logit_scale": 0.5, "softcap": 8.0},
    "smoothing": {"label_smoothing": 0.2, "bias": True},
    "smoothing and softcap": {"label_smoothing": 0.2, "softcap": 8.0},
    "z-loss": {"z_loss": 1e-2},
    "kl": {"k": 6, "kind": "kl"},
    "mse, all options": {
        "k": 7, "kind": "mse", "uneven": True, "weighted": True, "bias": True, "z_loss": 1e-2,
        "label_smoothing": 0.1, "logit_scale": 0.7,
    },
    "logprob": {"k": 6, "kind": "logprob", "weighted": True, "softcap": 8.0},
    "kl_mass": {"k": 6, "kind": "kl_mass", "weighted": True},
    "kl_mass, all options": {
        "k": 7, "kind": "kl_mass", "uneven": True, "weighted": True, "bias": True, "z_loss": 1e-2,
        "label_smoothing": 0.1, "logit_scale": 0.7, "softcap": 8.0,
    },
    "kl_mass without a softcap": {
        "k": 7, "kind": "kl_mass", "weighted": True, "z_loss": 1e-2, "label_smoothing": 0.1,
    },
    "static reference": {"k": 3, "kind": "mse", "static": True},
}  # fmt: skip
LEFT_OUT = ("kl_mass", "kl_mass, all options", "kl_mass without a softcap")


def run(ranks, cases, ends, upstream=None, **overrides):
    answers = ranks.run(losses, [(case, upstream, overrides) for case in cases], ends)
    return [whole(list(parts)) for parts in zip(*answers, strict=True)]


@pytest.mark.parametrize("reduction", [pytest.param("mean", marks=pytest.mark.slow), "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact(ranks, dtype, reduction):
    """V is odd, so that the second part is the smaller; several blocks of rows have their joins."""
    cases = [make_case(N, VOCAB, DIM, **options) for options in OPTIONS.values()]
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64) if reduction == "none" else None
    given = [case.to(dtype) for case in cases]
    found = run(ranks, given, cut(VOCAB, 2), upstream, filter_eps=0.0, reduction=reduction)
    for case, got in zip(given, found, strict=True):
        want = case.truth(upstream, reduction=reduction, filter_eps=0.0)
        # sums of a few hundred products in another order, 2^-24 each
        assert_close(got, want, 1e-10 if dtype == torch.float64 else 3e-6)


def test_filtered(ranks):
    """A filter of ε of the whole open mass: its promise, to fp64's rounding."""
    ends = [0, 256, VOCAB]  # whole tiles, so that the tiles of both parts are those of one head
    # with a softcap, smoothing is never filtered
    names = [name for name in OPTIONS if name not in ("smoothing and softcap", LEFT_OUT[1])]
    cases = [make_case(N, VOCAB, DIM, scale=1.5, **OPTIONS[name]) for name in names]
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
    eps, order = 2.0**-3, torch.arange(VOCAB)
    settings = {"filter_eps": eps, "screen": "exact", "reduction": "none"}
    found = run(ranks, cases, ends, upstream, **settings)
    for name, case, got in zip(names, cases, found, strict=True):
        if name in LEFT_OUT:  # the promise does not know what is left out
            want = case.run(upstream, backend="torch", **settings)
        else:
            want = filtered_truth(case, upstream, eps, order)
        assert_close(got, want, 1e-9)


def test_an_index_of_each_part(ranks):
    ends = [0, 256, VOCAB]
    case = make_case(N, VOCAB, DIM, scale=1.5, k=5, kind="kl")
    parts = [case.weight[a:b] for a, b in pairwise(ends)]
    indices = [VocabularyIndex.build(part, case.hidden_states) for part in parts]
    order = torch.cat([index.order + end for index, end in zip(indices, ends, strict=False)])
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
    eps = 2.0**-3
    settings = {"filter_eps": eps, "screen": "exact", "reduction": "none", "index": indices}
    (got,) = run(ranks, [case], ends, upstream, **settings)
    assert_close(got, filtered_truth(case, upstream, eps, order), 1e-9)


@pytest.mark.parametrize(
    "ends",
    [[0, VOCAB, VOCAB], pytest.param([0, 0, VOCAB], marks=pytest.mark.slow), [0, 1, VOCAB]],
    ids=str,
)
@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
def test_a_process_with_few_rows_or_none(ranks, ends, eps):
    cases = [make_case(N, VOCAB, DIM, **options) for options in OPTIONS.values()]
    for case, got in zip(cases, run(ranks, cases, ends, filter_eps=eps), strict=True):
        want = case.truth(filter_eps=0.0)
        assert_close(got, want, 1e-9 if eps == 0.0 else 5e-3)


def test_safety_tokens_on_one_process(ranks):
    """The other has none of them; then each has all but one."""
    for ids in ([3, 7, 9], [490, 499, 500], [0, 250, 251, 252, 500]):
        case = make_case(N, VOCAB, DIM, k=len(ids))
        for kind in ("kl", "kl_mass", "logprob", "mse"):
            safety = SafetyConstraint(ids, 0.7, kind=kind)
            case.settings["safety"] = safety
            reference = torch.nn.functional.pad(case.reference, (0, safety.references - len(ids)))
            given = replace(case, reference=reference)
            (got,) = run(ranks, [given], cut(VOCAB, 2))
            assert_close(got, given.truth(), 1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
def test_labels_that_are_safety_tokens(ranks, options, eps):
    """Of this process, of the other, and of one that has nothing else."""
    for vocab, ids in ((VOCAB, [3, 40, 300, 500]), (260, [5, 256, 257, 258, 259])):
        case = make_case(N, vocab, DIM, k=len(ids), kind="kl_mass", weighted=True, **options)
        case.settings["safety"] = SafetyConstraint(ids, 0.7, kind="kl_mass")
        case.labels[: 2 * len(ids)] = torch.tensor(ids * 2)
        (got,) = run(ranks, [case], [0, 256, vocab], filter_eps=eps)
        assert_close(got, case.truth(), 1e-9 if eps == 0.0 else 1e-6)


@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
def test_edges(ranks, eps):
    """All ignored, one token, no token at all, and infinite and missing numbers."""
    ignored = make_case(N, VOCAB, DIM, k=3, weighted=True)
    ignored.labels[:] = -100
    one = make_case(1, VOCAB, DIM, ignored=0.0, k=2)
    none = make_case(0, VOCAB, DIM)
    unlabelled = make_case(N, VOCAB, DIM)
    unlabelled.labels[:] = -100
    cases = [ignored, one, none, unlabelled]
    for case, got in zip(cases, run(ranks, cases, cut(VOCAB, 2), filter_eps=eps), strict=True):
        assert_close(got, case.truth(filter_eps=0.0), 1e-9 if eps == 0.0 else 5e-3)
    broken = make_case(N, VOCAB, DIM, ignored=0.0).to(torch.float32)
    broken.hidden_states[3] = float("nan")
    broken.weight[7, 2] = float("inf")  # on the first process alone
    upstream = torch.ones(N, dtype=torch.float64)
    (got,) = run(ranks, [broken], cut(VOCAB, 2), upstream, filter_eps=eps, reduction="none")
    assert not got["loss"].isfinite().all()
    assert got["loss"][3].isnan()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_sixteen_bits(ranks, dtype):
    """Row gradients are added up in fp32, so that they are as exact as those of one process."""
    cases = [
        make_case(N, VOCAB, DIM, **OPTIONS[name]).to(dtype)
        for name in ("plain", "kl", "mse, all options", "logprob", "kl_mass")
    ]
    found = run(ranks, cases, cut(VOCAB, 2), filter_eps=0.0)
    for case, got in zip(cases, found, strict=True):
        alone, truth = case.run(filter_eps=0.0), case.truth(filter_eps=0.0)
        for name, want in truth.items():
            errors = [(x[name].double() - want).norm() for x in (got, alone)]
            assert errors[0] <= 1.1 * errors[1] + 1e-6 * want.norm(), (name, errors)


@pytest.mark.parametrize("placement", ["rows", "whole"])
def test_a_dtensor(ranks, placement):
    """It says itself which rows a process has, and its gradients are placed as it is."""
    case = make_case(N, VOCAB, DIM, k=5, kind="kl", bias=True)
    for got in ranks.run(of_dtensor, case, placement):
        assert_close(got, case.truth(), 1e-9)


def test_a_dtensor_of_columns_is_refused(ranks):
    case = make_case(N, VOCAB, DIM)
    for error in ranks.errors(of_dtensor, case, "columns"):
        assert "weight has placements=(Shard(dim=1)" in error
        assert "split by rows" in error


def test_backward_twice(ranks):
    """Kept tensors are not changed by what is exchanged."""
    case = make_case(N, VOCAB, DIM, k=4, kind="logprob")
    first, second = ranks.run(twice, case)
    for got, again in (first, second):
        assert torch.equal(got, again)


def twice(case: Case):
    part, shard = own(case, cut(VOCAB, 2))
    hidden = part.hidden_states.clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, part.weight, part.labels, reference=part.reference, shard=shard, **part.settings
    )
    return [
        torch.autograd.grad(loss, hidden, retain_graph=True)[0],
        torch.autograd.grad(loss, hidden, retain_graph=True)[0],
    ]


@pytest.mark.parametrize(
    "how",
    ["few positions", "no index", "another screen", "smaller blocks", "a coarse screen"],
)
def test_no_process_goes_another_way(ranks, how):
    """What one process alone would choose, all choose, and none waits for the others for ever."""
    case = make_case(N, VOCAB, DIM, scale=1.5, k=5, kind="logprob").to(torch.float32)
    answers = ranks.run(apart, case, [0, 256, VOCAB], how)
    got = whole([found for found, _ in answers])
    exactly = how in ("few positions", "no index")
    assert_close(got, case.truth(), 1e-5 if exactly else 1e-2)
    for _, screened in answers:
        assert bool(screened) != exactly
        if how == "a coarse screen":
            assert screened.count("bf16") == screened.count("exact") > 0


@pytest.mark.parametrize("what", ["labels", "positions", "settings", "first"])
def test_processes_that_are_unlike_are_refused_together(ranks, what):
    first, second = ranks.errors(unlike, make_case(N, VOCAB, DIM), cut(VOCAB, 2), what)
    assert first == second
    assert (f"other {what}" if what != "first" else "the next is on none, or on two") in first


def test_a_narrow_pass_that_gives_up(ranks):
    """Logits of one process alone spread too far for it."""
    case = make_case(N, VOCAB, DIM, ignored=0.0).to(torch.bfloat16)
    case.weight[300:] *= 200.0
    (got,) = run(ranks, [case], cut(VOCAB, 2), filter_eps=0.0)
    assert_close(got, case.truth(filter_eps=0.0), 1e-2)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"k": 5, "kind": "mse"}, {"label_smoothing": 0.1}], ids=str
)
def test_what_is_exchanged(ranks, options, filtered):
    """Bytes and number of collectives, as documented; a trained weight's gradient needs none."""
    case = make_case(N, VOCAB, DIM, **options).to(torch.float32)
    if "k" in options:
        case.position_weights = None
        case.labels.clamp_(min=0)
    loss = Loss(
        positions=N, labelled=int((case.labels >= 0).sum()), hidden_size=DIM, vocab=VOCAB,
        tokens=options.get("k", 0), filtered=filtered, smoothed="label_smoothing" in options,
    )  # fmt: skip
    eps = 2.0**-11 if filtered else 0.0
    answers = ranks.run(counted, case, cut(VOCAB, 2), filter_eps=eps)
    assert answers[0] == answers[1] == list(loss.messages())


@pytest.fixture(scope="module")
def four():
    pool = Pool(4)
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [VOCAB, 5], ids=["ragged", "the last without rows"])
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes(four, processes, vocab):
    """Every option, exact and filtered; three of four have the head, and the last none of it."""
    options = [{**o, "k": min(o.get("k", 0), vocab - 1)} for o in OPTIONS.values()]
    cases = [make_case(N, vocab, DIM, **o) for o in options]
    ends = cut(vocab, processes)
    ends += [vocab] * (5 - len(ends))
    for eps in (0.0, 2.0**-11):
        for case, got in zip(cases, run(four, cases, ends, filter_eps=eps), strict=True):
            assert_close(got, case.truth(filter_eps=0.0), 1e-9 if eps == 0.0 else 5e-3)


def compiled(case: Case, ends: list[int]) -> list[torch.Tensor]:
    part, shard = own(case, ends)

    def loss(hidden):
        return 2.0 * linear_cross_entropy(hidden + 1.0, part.weight, part.labels, shard=shard)

    return [f(part.hidden_states) for f in (loss, torch.compile(loss, backend="eager"))]


@pytest.mark.slow
def test_in_compiled_code(ranks):
    """The loss runs eagerly there."""
    for plain, traced in ranks.run(compiled, make_case(N, VOCAB, DIM), cut(VOCAB, 2)):
        torch.testing.assert_close(plain, traced)


def on_gpus(case: Case, ends: list[int], **overrides) -> list[dict[str, torch.Tensor]]:
    part, shard = own(case, ends)
    device = torch.device("cuda", torch.distributed.get_rank())
    torch.cuda.set_device(device)
    group = torch.distributed.new_group(backend="nccl")
    moved = {n: x.to(device) for n, x in vars(part).items() if isinstance(x, torch.Tensor)}
    shard = replace(shard, group=group)
    found = replace(part, **moved).run(shard=shard, **overrides)
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
def test_nccl(ranks, eps):
    for name in ("plain", "kl", "mse, all options", "logprob", "kl_mass"):
        case = make_case(64, VOCAB, 64, **OPTIONS[name]).to(torch.float32)
        got = whole(ranks.run(on_gpus, case, cut(VOCAB, 2), filter_eps=eps))
        assert_close(got, case.truth(filter_eps=0.0), 1e-4 if eps == 0.0 else 1e-2)
