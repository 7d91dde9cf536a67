"""Deferred logits: what is folded, what is built, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.functional import linear_cross_entropy
from str_kernels.huggingface import DeferredLogits, patch_model
from str_kernels.huggingface.deferred.head_call import HeadCall
from str_kernels.huggingface.deferred.tensor import defer_linear
from tests.huggingface.models import batch, build, relative

B, T, D, V = 2, 5, 8, 11


class Owner:
    """Computes the fused loss and notes the rows it was asked for."""

    running = True

    def __init__(self) -> None:
        self.rows: list[int] | None = None
        self.read: list[str] = []

    def cross_entropy(self, fold, target, **settings):
        self.rows = fold.rows.flatten().tolist()
        return linear_cross_entropy(
            fold.hidden_states,
            fold.weight,
            target,
            bias=fold.bias,
            logit_scale=fold.logit_scale,
            softcap=fold.softcap,
            **settings,
        )

    def logits_read(self, by, size):
        self.read.append(by)


def operands(bias: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"states": torch.randn(B, T, D, generator=g), "weight": torch.randn(V, D, generator=g)}
    if bias:
        made["bias"] = torch.randn(V, generator=g)
    return {name: x.double().requires_grad_() for name, x in made.items()}


def deferred(made: dict[str, Tensor], owner: Owner | None = None) -> DeferredLogits:
    return defer_linear(
        made["states"], made["weight"], made.get("bias"), HeadCall(owner or Owner())
    )


def run(make: Callable, through: Callable, **kwargs) -> dict[str, Tensor]:
    made = operands(**kwargs)
    loss = through(make(made))
    return {
        "loss": loss,
        **dict(zip(made, torch.autograd.grad(loss.sum(), made.values()), strict=True)),
    }


def real(made: dict[str, Tensor]) -> Tensor:
    return F.linear(made["states"], made["weight"], made.get("bias"))


TARGET = torch.tensor([[1, 2, -100, 4, 5], [6, 7, 8, -100, 10]])
WORDS = torch.linspace(0.5, 2, V, dtype=torch.float64)
EVEN = torch.arange(B * T)[::2]


def loss(logits: Tensor, rows: Tensor | slice = slice(None), **settings) -> Tensor:
    return F.cross_entropy(logits, TARGET.flatten()[rows] % logits.shape[1], **settings)


def flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


MASK = TARGET != -100
FOLDED = {
    "float and view": lambda z: loss(z.float().double().view(-1, V), ignore_index=9),
    "scale": lambda z: loss(flat(z * 0.3 / 2)),
    "negative scale": lambda z: loss(flat(-0.5 * z)),
    "scale by a tensor": lambda z: loss(flat(z * torch.tensor(0.7, dtype=torch.float64))),
    "softcap": lambda z: loss(flat(torch.tanh(z / 3) * 3)),
    "softcap after a scale": lambda z: loss(flat(2.0 * torch.tanh(z * 0.5))),
    "bias added": lambda z: loss(flat(z * 2 + WORDS)),
    "a factor a word": lambda z: loss(flat(z * WORDS)),
    "all but the last": lambda z: F.cross_entropy(flat(z[:, :-1]), TARGET[:, 1:].flatten()),
    "ellipsis": lambda z: F.cross_entropy(flat(z[..., :-1, :]), TARGET[:, 1:].flatten()),
    "part of the words": lambda z: loss(flat(z[..., :7]) * 1.0, EVEN.new_tensor(range(B * T))),
    "a mask": lambda z: F.cross_entropy(z[MASK], TARGET[MASK]),
    "an index": lambda z: loss(flat(z)[EVEN], EVEN),
    "one sequence": lambda z: F.cross_entropy(z[1], TARGET[1]),
    "words second": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "permuted": lambda z: F.cross_entropy(z.permute(0, 2, 1), TARGET, reduction="sum"),
    "time first": lambda z: F.cross_entropy(flat(z.transpose(0, 1)), TARGET.T.flatten()),
    "flatten": lambda z: loss(z.flatten(0, 1).contiguous().clone()),
    "squeezed": lambda z: loss(flat(z.unsqueeze(1).squeeze(1))),
    "log-softmax": lambda z: F.nll_loss(F.log_softmax(flat(z), dim=-1), TARGET.flatten()),
    "no reduction": lambda z: loss(flat(z), reduction="none"),
    "smoothed": lambda z: loss(flat(z), label_smoothing=0.1),
    "module": lambda z: torch.nn.CrossEntropyLoss()(flat(z), TARGET.flatten()),
    "sum of two": lambda z: loss(flat(z + z * 0.5)),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_folded(name, bias):
    """What models do to logits is folded, never computed: same loss and gradients."""
    owner = Owner()
    got = run(lambda made: deferred(made, owner), FOLDED[name], bias=bias)
    want = run(real, FOLDED[name], bias=bias)
    assert owner.read == []
    assert owner.rows is not None
    for key in want:
        assert got[key].shape == want[key].shape
        # fp64, but some of these pass through float
        assert relative(got[key], want[key]) < 1e-6, key


BUILT = {
    "class weights": lambda z: loss(flat(z), weight=WORDS),
    "probabilities": lambda z: F.cross_entropy(flat(z), flat(z).detach().softmax(-1)),
    "arg-max": lambda z: z.argmax(-1).double() + flat(z).sum() * 0,
    "relu": lambda z: loss(flat(z.relu())),
    "twice capped": lambda z: loss(flat(torch.tanh(torch.tanh(z)))),
    "strided words": lambda z: loss(flat(z[..., ::2])),
    "concatenated": lambda z: loss(torch.cat([flat(z)])),
    "squared": lambda z: (z * z).mean(),
    "softmax": lambda z: z.softmax(-1)[..., 3].sum(),
    "gather": lambda z: z.log_softmax(-1).gather(-1, TARGET.clamp(min=0)[..., None]).sum(),
    "below torch functions": lambda z: torch.ops.aten.mul.Tensor(z, 2.0).sum(),
}


@pytest.mark.parametrize("name", BUILT)
def test_built(name):
    """Everything else gets real logits: right values, right gradients."""
    owner = Owner()
    got, want = run(lambda made: deferred(made, owner), BUILT[name]), run(real, BUILT[name])
    for key in want:
        assert relative(got[key], want[key]) < 1e-12, key


def test_rows_are_followed():
    """A fold knows which row of the head's call each of its rows is."""
    owner = Owner()
    z = deferred(operands(), owner)
    F.cross_entropy(z[:, :-1].transpose(0, 1).reshape(-1, V), TARGET[:, 1:].T.flatten())
    assert owner.rows == [0, 5, 1, 6, 2, 7, 3, 8]


def test_reading_does_not_change_the_loss():
    """Once somebody has looked, the loss is fused all the same."""
    owner = Owner()
    z = deferred(operands(), owner)
    z.argmax(-1)
    loss(flat(z))
    assert owner.rows is not None


def test_writes_are_seen_by_views_and_not_by_copies():
    """In-place writes: as with a real tensor."""

    def write(z: Tensor) -> Tensor:
        view, copied = z[:, 1:], z.clone()
        z[:, 2] = 0
        z.mul_(3)
        return loss(flat(z)) + 2 * (view * WORDS).sum() + copied.square().sum()

    got, want = run(deferred, write), run(real, write)
    for key in want:
        assert relative(got[key], want[key]) < 1e-12, key


def test_a_watched_gradient_is_the_real_one():
    """A hook set before the loss sees the gradient of the logits; the loss is then not fused."""
    seen = []

    def watch(z: Tensor) -> Tensor:
        z.register_hook(lambda gradient: seen.append(gradient))
        return loss(flat(z))

    run(deferred, watch), run(real, watch)
    assert relative(seen[0], seen[1]) < 1e-12


@pytest.mark.parametrize(
    "ask",
    [
        lambda z, total: z.retain_grad(),
        lambda z, total: z.register_hook(print),
        lambda z, total: torch.autograd.grad(total, z, allow_unused=True),
        lambda z, total: torch.autograd.grad(total, [z], allow_unused=True),
    ],
)
def test_no_gradient_after_a_fused_loss(ask):
    """Asked for too late, the gradient of the logits is refused rather than partial."""
    z = deferred(operands())
    total = loss(flat(z))
    with pytest.raises(RuntimeError, match="does not pass through its logits"):
        ask(z, total)


def test_logits_after_the_optimizer_step():
    """Unread logits cannot be read after the weights moved; read before, they stay."""
    model, inputs = build(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with patch_model(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early, late = model(**inputs), model(**inputs)
        want = early.logits.argmax(-1)
        early.loss.backward()
        optimizer.step()
        assert torch.equal(early.logits.argmax(-1), want)
        for read in (
            lambda: late.logits.argmax(-1),
            lambda: F.cross_entropy(late.logits.flatten(0, 1), inputs["labels"].flatten()),
        ):
            with pytest.raises(RuntimeError, match=r"read outputs\.logits before the step"):
                read()


def test_copies_and_files():
    """deepcopy, pickle and printing work as with a tensor; printing computes nothing."""
    made = operands()
    z, want = deferred(made).detach(), real(made).detach()
    assert "pending" in repr(z)
    assert not z.is_materialised
    assert torch.equal(copy.deepcopy(z), want)
    assert torch.equal(pickle.loads(pickle.dumps(z)), want)
    assert z.numpy().tolist() == want.tolist() == z.tolist()


def test_one_warning_for_each_function():
    """Who asked for the logits is said, once each."""
    model, inputs = build(), batch()
    with patch_model(model):
        with pytest.warns(UserWarning, match="in full: argmax asked .* here 0.0 MiB"):
            model(**inputs).logits.argmax(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs).logits.argmax(-1)
        with pytest.warns(UserWarning, match="in full: softmax asked"):
            model(**inputs).logits.softmax(-1)


READS = {
    "comparison": lambda z: z > 0,
    "equality": lambda z: z == z.materialise(),
    "cpu": lambda z: z.cpu(),
    "detached numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "element": lambda z: torch.tensor(z[0, 1, 2].item()),
    "one token": lambda z: z[:, -1, :],
    "some words": lambda z: z[..., [1, 2]],
    "topk": lambda z: z.topk(3).indices,
    "stack": lambda z: torch.stack([z, z]),
    "loop": lambda z: torch.stack(list(z)),
    "clone in place": lambda z: z.clone().fill_(1),
    "no grad": lambda z: torch.no_grad()(lambda: z.softmax(-1))(),
    "formatted": lambda z: torch.tensor(float(f"{z.sum():.3f}")),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name):
    """What users do with logits gives what it gives with a tensor."""
    made = operands()
    got, want = READS[name](deferred(made)), real(made)
    want.materialise = lambda: want
    want = READS[name](want)
    got = got.materialise() if isinstance(got, DeferredLogits) else got
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_saved_with_torch(tmp_path):
    """``torch.save`` writes a plain tensor."""
    made = operands()
    torch.save({"logits": deferred(made)}, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt")["logits"], real(made).detach())


def test_hooks_see_real_logits():
    """A forward hook of the head may read, and replace, its output."""
    seen = {}
    for patched in (False, True):
        model, inputs, read = build(), batch(), []
        model.lm_head.register_forward_hook(
            lambda m, a, z, read=read: read.append(z.sum()) or 2 * z
        )
        if patched:
            patch_model(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen[patched] = torch.stack([model(**inputs).loss, read[-1]])
    assert relative(seen[True], seen[False]) < 1e-6


def test_logits_to_keep():
    """With labels and ``logits_to_keep`` the logits are those of the last positions."""
    model, inputs = build(), batch()
    inputs = {**inputs, "labels": inputs["labels"][:, -4:]}
    want = model(**inputs, logits_to_keep=4)
    with patch_model(model):
        got = model(**inputs, logits_to_keep=4)
        assert got.logits.shape == want.logits.shape
        assert torch.equal(got.logits.materialise(), want.logits)
    assert relative(got.loss, want.loss) < 1e-6


def test_fp32_values_under_autocast():
    """Logits read after autocast has ended are those that autocast would have made."""
    model, inputs = build(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs).logits
        with patch_model(model):
            logits = model(**inputs).logits
    assert logits.dtype == want.dtype == torch.bfloat16
    assert torch.equal(logits.materialise(), want)
