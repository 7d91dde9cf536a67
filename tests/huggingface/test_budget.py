"""``strength="auto"``: what λ is, when it moves, and that the drift settles at the budget."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from str_kernels import LinearCrossEntropyLoss, SafetyConstraint, linear_cross_entropy
from str_kernels.constraint import constraint_terms
from str_kernels.huggingface import SafetyLogCallback, patch_model
from str_kernels.huggingface.budget import (
    EASE,
    HIGHEST,
    INTEGRAL,
    LOWEST,
    PROPORTIONAL,
    DriftBudget,
)
from str_kernels.terms import RowTerms
from tests.huggingface.dense import dense_loss, safety_values, weights
from tests.huggingface.models import batch, build
from tests.huggingface.test_architectures import assert_same
from tests.huggingface.test_constraint import gradients, lora
from tests.huggingface.test_meter import Reads
from tests.huggingface.test_trainer import Losses, lora_model, trainer_for

IDS = [3, 17, 40, 95]
AUTO = SafetyConstraint(IDS, "auto", "mse", drift_budget=0.4)


def row_terms(penalty: torch.Tensor) -> RowTerms:
    """Rows of which only the penalty matters."""
    return RowTerms(*[torch.zeros_like(penalty)], penalty, *[None] * 6)


def add(budget: DriftBudget, drift: float, weight: float = 1.0) -> None:
    """One training forward of one row, with this drift."""
    penalty = torch.tensor([weight * drift**2 / budget._scale])
    budget.apply(row_terms(penalty), torch.tensor([weight]), learning=True)


def path_by_hand(drifts, limit, start=0.0):
    """λ after each step, in Python's doubles: the header of budget.py."""
    integral, top, bottom, path = start, 0.0, 0.0, []
    for drift, weight in drifts:
        top, bottom = 0.9 * top + 0.1 * weight * drift**2, 0.9 * bottom + 0.1 * weight
        drift = math.sqrt(top / bottom)
        error = min(1.0, max(EASE, math.log(drift / limit))) if drift else EASE
        integral += INTEGRAL * error
        path.append(min(HIGHEST, math.exp(integral + PROPORTIONAL * error)))
    return path


def step(budget: DriftBudget, drift: float, weight: float = 1.0) -> float:
    """λ after an optimizer step whose one forward had this drift."""
    add(budget, drift, weight)
    budget.settle()
    return budget.strength.item()


def test_the_path_of_the_strength():
    """λ of every step is the formula's, over drifts below, far below and far above the budget."""
    drifts = [(0.0, 3.0), (0.1, 1.0), (0.3, 2.0), (5.0, 4.0), (0.9, 1.0), (0.4, 7.0), (0.2, 1.0)]
    budget = DriftBudget(AUTO)
    got = [step(budget, *each) for each in drifts]
    assert got == pytest.approx(path_by_hand(drifts, 0.4), rel=1e-5)  # fp32 against doubles


@pytest.mark.parametrize(
    ("kind", "drift", "bound"),
    [("mse", 1e4, HIGHEST), ("mse", 0.0, LOWEST), ("kl", 1e4, 10 * HIGHEST), ("kl", 0.0, LOWEST)],
)
def test_the_strength_has_bounds_and_comes_back(kind, drift, bound):
    """However long it errs, λ stays within its bounds, and leaves them when the drift turns."""
    budget = DriftBudget(SafetyConstraint(IDS, "auto", kind, drift_budget=0.4))
    for _ in range(600):
        last = step(budget, drift)
    assert last == pytest.approx(bound, rel=1e-5)
    budget._state[2:] = 0  # forget the drifts; the integral is what could be wound up
    turned = [step(budget, 0.4) for _ in range(3)][-1]
    budget._state[2:] = 0
    for _ in range(60):
        later = step(budget, 4.0 if bound == LOWEST else 0.04)
    assert (later > 2 * turned) == (bound == LOWEST)
    assert later != pytest.approx(turned, rel=0.3)


def test_a_budget_that_cannot_be_held_is_told_once(recwarn):
    """At the upper bound, and only there, the report warns of it."""
    budget = DriftBudget(AUTO)
    step(budget, 0.5)
    budget.report()
    assert not recwarn
    for _ in range(60):
        step(budget, 4.0)
    for _ in range(2):
        budget.report()
    assert [str(w.message) for w in recwarn] == [
        "The safety tokens drift by 4 logits, past drift_budget=0.4, and the strength is at its "
        "bound of 10: lower the learning rate or raise the budget."
    ]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (0.0, 0.0)])
def test_a_step_that_says_nothing_moves_nothing(bad):
    """An overflow, or a step without a constrained position, leaves λ and its memory alone."""
    budget = DriftBudget(AUTO)
    step(budget, 0.7)
    before = budget.state_dict()
    step(budget, *bad)
    assert budget.state_dict() == before
    assert step(budget, 0.7) != before["state"][1]


def test_a_distance_that_rounds_below_zero_is_none():
    """A KL of nothing is -1e-9 on some machines: λ eases as at no drift, and the report reads 0."""
    budget, still = (DriftBudget(SafetyConstraint(IDS, "auto", drift_budget=0.4)) for _ in range(2))
    for _ in range(3):
        budget.apply(row_terms(torch.tensor([-1e-9])), torch.tensor([1.0]), learning=True)
        budget.settle()
        step(still, 0.0)
    assert budget.report() == still.report()
    assert budget.report()["budgeted_drift"] == 0.0


def drift_by_hand(model, inputs, safety) -> float:
    """The drift that a budget bounds, of one batch at all positions, in doubles."""
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z = safety_values(model(**arguments).logits.double(), safety)
        with model.disable_adapter():
            r = safety_values(model(**arguments).logits.double(), safety)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    w = weights(shifted, inputs["attention_mask"], "all").double()
    omega = torch.tensor(safety.token_weights or [1.0] * len(IDS)).double()
    if safety.kind == "kl":
        tau = safety.temperature
        q = (r / tau + omega.log()).log_softmax(-1)
        p = (z / tau + omega.log()).log_softmax(-1)
        squared = 2 * tau**2 * (q.exp() * (q - p)).sum(-1)
    else:
        distance = (r - safety.margin - z).clamp(min=0) if safety.kind == "floor" else z - r
        squared = (omega * distance.square()).sum(-1) / omega.sum()
    return ((w * squared).sum() / w.sum()).sqrt().item()


KINDS = {
    "mse": {"token_weights": (0.5, 1.0, 2.0, 4.0)},
    "floor": {"margin": 0.05},
    "logprob": {},
    "kl": {"temperature": 2.0, "token_weights": (0.5, 1.0, 2.0, 4.0)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_drift_of_every_kind(kind):
    """The reported drift is the constraint's own measure: rms in logit units by its weights."""
    safety = SafetyConstraint(IDS, "auto", kind=kind, drift_budget=0.1, **KINDS[kind])
    model, inputs = lora(), batch()
    want = drift_by_hand(model, inputs, safety)
    with patch_model(model, safety) as patch:
        model(**inputs)
        patch.budget.settle()
        got = patch.budget.report()["budgeted_drift"]
    assert want > 0.02
    # fp32 logits of about 8, off by some 2^-21 of that, in differences of about 0.1
    assert got == pytest.approx(want, rel=1e-3)


def test_kl_is_in_logit_units():
    """A small difference of logits has the drift of its rms, whatever the temperature; a shift of
    all of them none.
    """
    r = torch.zeros(4, dtype=torch.float64)
    z = r + torch.tensor([0.01, -0.01, 0.01, -0.01]) + 3.0
    for temperature in (1.0, 4.0):
        safety = SafetyConstraint(IDS, 0.0, kind="kl", temperature=temperature)
        drift = (2 * constraint_terms(safety, z[None], r).value).sqrt().item()
        assert drift == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "positions"), [("mse", "all"), ("floor", "labels"), ("logprob", 2), ("kl", "all")]
)
def test_the_loss_is_that_of_its_strength(kind, positions):
    """Loss, gradients and the reported penalty of each step: CE + λ · penalty with λ as it was
    before the step, by hand; in evaluation too.
    """
    model, plain, inputs = lora(), lora(), batch()
    safety = SafetyConstraint(IDS, "auto", kind=kind, drift_budget=0.4)
    seen = []
    with patch_model(model, safety, positions=positions) as patch:
        for training in (True, True, True, False):
            model.train(training)
            seen.append(patch.budget.strength.item())
            got = gradients(model, model(**inputs).loss)
            want = gradients(plain, dense_loss(plain, inputs, safety.at(seen[-1]), positions))
            assert_same(got, want, 2e-5)
            both = patch.last_parts.cross_entropy + patch.last_parts.penalty
            assert both.item() == pytest.approx(got["loss"].item())
            patch.budget.settle()
    assert seen[0] == (10.0 if kind == "kl" else 1.0)
    assert len(set(seen)) == 4


def test_only_training_moves_it():
    """Evaluation and no-grad forwards use λ and leave it; an optimizer's step moves it, once."""
    model, inputs = lora(), batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with patch_model(model, AUTO) as patch:

        def after(*, training: bool, grad: bool) -> float:
            model.train(training)
            with torch.set_grad_enabled(grad):
                model(**inputs)
            return patch.budget.strength.item()

        assert after(training=True, grad=True) == 1.0
        assert after(training=True, grad=True) == 1.0  # no step in between: accumulation
        optimizer.step()
        for training, grad in ((False, True), (True, False), (False, False)):
            assert after(training=training, grad=grad) == 1.0
        first = after(training=True, grad=True)  # the first forward after the step
        assert first != 1.0
        patch.budget.settle()
        patch.budget.settle()
        second = patch.budget.strength.item()
        optimizer.step()
        model.eval()
        model(**inputs)
        patch.budget.settle()
        assert patch.budget.strength.item() == second != first


def losses_and_strengths(model, batches, accumulation: int) -> list[float]:
    """λ after each optimizer step of SGD over the batches, without a trainer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, path = torch.optim.SGD(parameters, lr=0.5), []
    with patch_model(model, AUTO) as patch:
        items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches) / len(batches)
        for number, inputs in enumerate(batches, start=1):
            model(**inputs, num_items_in_batch=items * accumulation).loss.backward()
            if number % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
                path.append(patch.budget.strength.item())
        patch.budget.settle()
        return [*path[1:], patch.budget.strength.item()]


def test_accumulation_is_one_batch():
    """3 × 4 rows take the path of 3 × 2 × 2, and it is updated once a step."""
    many = batch(rows=4)
    halves = [{n: x[i : i + 2] for n, x in many.items()} for i in (0, 2)]
    want = losses_and_strengths(lora(), [many] * 3, 1)
    got = losses_and_strengths(lora(), halves * 3, 2)
    assert len(set(want)) == 3
    assert got == pytest.approx(want, rel=1e-4)


def trained(folder, *, resume=None, callback=SafetyLogCallback, **settings):
    """The training logs of a run with dropout, of six steps by default."""
    torch.manual_seed(0)
    model = lora_model(lora_dropout=0.1)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **settings}
    with patch_model(model, AUTO) as patch:
        trainer = trainer_for(model, folder, callbacks=[callback(patch)], **settings)
        trainer.train(resume_from_checkpoint=resume)
    return [log for log in trainer.state.log_history if "loss" in log]


def test_a_resumed_run_takes_the_same_path(tmp_path):
    """Bit for bit, wherever the checkpoint lies, also where the trainer rebuilds its callbacks."""
    names = ("safety_strength", "budgeted_drift", "loss")
    want = [[log[name] for name in names] for log in trained(tmp_path / "a")[3:]]
    elsewhere = str((tmp_path / "a" / "checkpoint-3").rename(tmp_path / "checkpoint-3"))
    for settings in ({}, {"restore_callback_states_from_checkpoint": True}):
        logs = trained(tmp_path / "b", resume=elsewhere, **settings)[3:]
        assert [[log[name] for name in names] for log in logs] == want
    assert len({strength for strength, *_ in want}) == 3


def test_a_checkpoint_of_a_fixed_strength(tmp_path):
    """It has no strength to go on from: λ begins anew, and the run can be saved."""

    class Old(SafetyLogCallback):
        def state(self):
            return {"args": {}, "attributes": {"saved": None}}

    trained(tmp_path / "a", callback=Old, max_steps=3)
    logs = trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"))[3:]
    afresh = DriftBudget(AUTO)
    assert logs[0]["safety_strength"] == pytest.approx(step(afresh, logs[0]["budgeted_drift"]))
    assert (tmp_path / "a" / "checkpoint-6" / "trainer_state.json").is_file()


def test_the_callback_finds_the_patch(tmp_path):
    """Without an argument it logs for the patch that the model carries; without one it says so."""
    model, seen = lora_model(), Losses()
    with pytest.raises(ValueError, match="is not patched"):
        trainer_for(model, tmp_path, callbacks=[SafetyLogCallback()]).train()
    with patch_model(model, AUTO):
        trainer_for(model, tmp_path, callbacks=[SafetyLogCallback(), seen], max_steps=1).train()
    assert seen.logs[0]["safety_strength"] > 0


def test_unpatched_and_patched_again():
    """Nothing of the strength stays on the model, and the next patch begins at the start."""
    model, inputs = lora(), batch()
    before = gradients(model, model(**inputs).loss)
    attributes = set(model.base_model.model.__dict__)
    for _ in range(2):
        with patch_model(model, AUTO) as patch:
            assert patch.budget.strength.item() == 1.0
            model(**inputs)
            patch.budget.settle()
            assert patch.budget.strength.item() != 1.0
    assert set(model.base_model.model.__dict__) == attributes
    assert_same(gradients(model, model(**inputs).loss), before, 0.0)


def test_no_step_waits_for_the_device():
    """Neither the forwards nor the update read a value; the report reads one tensor."""
    budget = DriftBudget(AUTO)
    with Reads() as reads:
        for _ in range(3):
            add(budget, 0.5)
            budget.settle()
    assert reads.seen == []
    with Reads() as reads:
        budget.report()
    assert reads.seen == ["tolist"]


# drift and weight of each process in each step; one has nothing to constrain in the second
SHARES = [((0.2, 1.0), (0.9, 3.0)), ((0.5, 2.0), (0.0, 0.0)), ((0.1, 5.0), (0.7, 1.0))]


def test_all_processes_agree(monkeypatch):
    """Each process takes the path of all forwards in one process, whichever were its own."""
    alone, want = DriftBudget(AUTO), []
    for shares in SHARES:
        for share in shares:
            add(alone, *share)
        alone.settle()
        want.append(alone.strength.item())
    sent: list[torch.Tensor] = []
    for rank in (0, 1):
        others = [torch.tensor([w * d**2, w]) for d, w in (each[1 - rank] for each in SHARES)]

        def all_reduce(sums, others=others):
            sent.append(sums.clone())
            sums += others.pop(0)

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        budget = DriftBudget(AUTO)
        got = [step(budget, *each[rank]) for each in SHARES]
        assert got == pytest.approx(want, rel=1e-6)
    assert len(sent) == 2 * len(SHARES)


@pytest.mark.parametrize(
    ("kind", "lr", "limit", "seed"),
    [("mse", 3e-2, 0.5, 4), ("mse", 1e-2, 0.2, 4), ("kl", 1e-2, 0.4, 1)],
)
def test_the_drift_settles_at_the_budget(kind, lr, limit, seed):
    """Over learning rates, budgets, kinds and tasks."""
    safety = SafetyConstraint(IDS, "auto", kind=kind, drift_budget=limit)
    assert settled(safety, lr, seed) == pytest.approx(limit, rel=0.2)


def test_a_strength_does_not():
    """What the runs above would show without the controller: λ = 1 drifts twice as far."""
    assert settled(SafetyConstraint(IDS, 1.0, "mse"), 1e-2, 4, steps=100) > 1.5 * 0.2


def settled(safety: SafetyConstraint, lr: float, seed: int, steps: int = 180) -> float:
    """The drift by hand after training on four batches, a mean over them."""
    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = [batch(rows=4, seed=100 * seed + i) for i in range(4)]
    with patch_model(model, safety, verify=False):
        for number in range(steps):
            model(**batches[number % 4]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    drifts = torch.tensor([drift_by_hand(model, inputs, safety) for inputs in batches])
    return drifts.square().mean().sqrt().item()


LOSS = (torch.randn(3, 4), torch.randn(6, 4), torch.tensor([1, 2, 3]))


def test_a_loss_alone_refuses_it():
    """A loss knows no steps: it says what does."""
    safety = SafetyConstraint([1, 2], "auto")
    for call in (
        lambda: linear_cross_entropy(*LOSS, safety=safety, reference=torch.zeros(2)),
        lambda: LinearCrossEntropyLoss(safety=safety),
    ):
        with pytest.raises(ValueError, match=r"strength='auto'.*patch_model"):
            call()


@pytest.mark.parametrize(
    ("strength", "budget", "message"),
    [
        ("much", None, "strength='much'.*'auto' or a number"),
        ("auto", 0.0, "drift_budget=0.0.*above 0"),
        ("auto", math.nan, "drift_budget=nan"),
        ("auto", "wide", "drift_budget='wide'"),
        (1.0, 0.5, "drift_budget=0.5.*strength='auto'"),
    ],
)
def test_wrong_settings(strength, budget, message):
    """Each says what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        SafetyConstraint(IDS, strength, drift_budget=budget)


def test_settings_and_states():
    """The default budget, the same constraint at a fixed strength, and states of something else."""
    assert SafetyConstraint(IDS, "auto").drift_budget == 0.5
    assert AUTO.at(2.0) == SafetyConstraint(IDS, 2.0, "mse")
    for state in ({}, {"state": [1.0]}, None):
        with pytest.raises(ValueError, match="state_dict"):
            DriftBudget(AUTO).load_state_dict(state)
