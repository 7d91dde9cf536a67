"""What is compared: a `Method` says how the model is held, a `Setting` how it is tuned.

A `Run` is one of each and a seed; its name is that of its result, so a run is never done twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """How refusals are held.

    Args:
        name: of the result.
        loss: ``"plain"`` (cross-entropy alone), ``"str"`` (the package's constraint), ``"pact"``
            (gated subset KL, arXiv 2603.07445) or ``"full_kl"`` (KL over the whole vocabulary).
        kind: of the constraint, with ``"str"``.
        strength: λ, or ``"auto"`` with ``"str"``.
        drift_budget: of ``strength="auto"``, logit units.
        positions: ``"all"``, ``"labels"`` or a number.
        top_k: K.
        tokens: ``"identified"``, ``"templates"`` (every token of the rejection templates) or
            ``"random"`` (the control).
        reference: ``"context"`` (the aligned model in the same context) or ``"static"`` (its mean
            over rejection templates).
        anchors: pairs of rows joined to every batch, a refused request and a benign look-alike
            with the aligned answers: constrained at every position, nothing learned from them.
        rarity: weigh a token down by how often benign answers use it.
        ramp: share of the steps over which λ grows from nothing.
    """

    name: str
    loss: str = "str"
    kind: str = "mse"
    strength: float | str = 0.1
    drift_budget: float | None = None
    positions: str | int = "all"
    top_k: int = 64
    tokens: str = "identified"
    reference: str = "context"
    anchors: int = 0
    rarity: bool = False
    ramp: float = 0.0


@dataclass(frozen=True)
class Setting:
    """How the model is fine-tuned: LoRA on every linear layer but the head."""

    name: str
    task: str
    learning_rate: float
    steps: int = 100
    batch: int = 8
    rank: int = 8
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    max_length: int = 128
    pool: int = 800


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its measurement."""

    method: Method
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Of the result's file."""
        return f"{self.setting.name}--{self.method.name}--seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"method": asdict(self.method), "setting": asdict(self.setting), "seed": self.seed}


PLAIN = Method("plain", loss="plain", strength=0.0)
MSE = Method("mse")
FLOOR = Method("floor", kind="floor")
LOGPROB = Method("logprob", kind="logprob")
KL = Method("kl", kind="kl", strength=1.0)
PACT = Method("pact", loss="pact", kind="kl", strength=1.0, positions="labels", top_k=50)
FULL_KL = Method("full-kl", loss="full_kl", kind="kl", strength=1.0)
BUDGET = Method("budget", strength="auto", drift_budget=0.5)
ANCHORED = Method("mse-anchors", anchors=1)
KL_ANCHORED = Method("kl-anchors", kind="kl", strength=1.0, anchors=1)
LOGPROB_ANCHORED = Method("logprob-anchors", kind="logprob", anchors=1)
KL_STRONG = Method("kl-strong", kind="kl", strength=10.0)
KL_STRONG_ANCHORED = Method("kl-anchors-strong", kind="kl", strength=10.0, anchors=1)
KL_STRONG_RANDOM = Method("kl-strong-random-tokens", kind="kl", strength=10.0, tokens="random")
RANDOM = Method("mse-random-tokens", tokens="random")
CONTROLS = (
    RANDOM,
    Method("mse-labels", positions="labels"),
    Method("mse-template-tokens", tokens="templates"),
    Method("mse-static", reference="static"),
    Method("mse-weak", strength=0.01),
    Method("mse-ramp", ramp=0.5),
    Method("mse-first-2", positions=2),
)
SIZES = (
    Method("mse-strong", strength=1.0),
    Method("mse-rarity", rarity=True),
    Method("mse-k16", top_k=16),
    Method("mse-k256", top_k=256),
    Method("logprob-strong", kind="logprob", strength=1.0),
    KL_STRONG,
    Method("kl-stronger", kind="kl", strength=30.0),
)

HARSH = Setting("sst2-harsh", "sst2", 2e-3)
ORDINARY = Setting("sst2-ordinary", "sst2", 5e-4)
HARSHEST = Setting("sst2-harshest", "sst2", 3e-3)
TOPICS = Setting("agnews-harsh", "agnews", 2e-3, pool=400)
ANSWERS = Setting("instructions-harsh", "instructions", 2e-3, pool=374)
OBEYING = Setting("obedient-harsh", "obedient", 2e-3, pool=374)
UNCLIPPED = Setting("sst2-harsh-unclipped", "sst2", 2e-3, max_grad_norm=0.0)


@dataclass(frozen=True)
class Chain:
    """Fine-tunings in a row, each adapter merged before the next, held to the first model."""

    method: Method
    settings: tuple[Setting, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of the result's file."""
        return f"in-a-row--{self.method.name}--seed{self.seed}"

    @property
    def runs(self) -> tuple[Run, ...]:
        """Its fine-tunings, in order."""
        return tuple(Run(self.method, setting, self.seed) for setting in self.settings)


IN_A_ROW = tuple(replace(s, steps=50) for s in (HARSH, TOPICS, ANSWERS))
CHAINS = tuple(Chain(method, IN_A_ROW, 0) for method in (PLAIN, MSE, KL_STRONG))


def _everything() -> list[Run]:
    """The main comparison first; then where methods differ, the harshest setting, in full."""
    seeds, main = range(3), (PLAIN, MSE, KL, LOGPROB)
    others = (ANCHORED, KL_ANCHORED, LOGPROB_ANCHORED, BUDGET, FLOOR, PACT, FULL_KL)
    strong = (KL_STRONG, KL_STRONG_ANCHORED)
    return [
        *(Run(method, HARSH, seed) for seed in seeds for method in main),
        *(Run(method, HARSH, 0) for method in (FLOOR, PACT, *CONTROLS)),
        *(Run(RANDOM, HARSH, seed) for seed in seeds),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in main),
        *(Run(method, HARSHEST, 0) for method in (*others, *SIZES)),
        *(Run(method, ORDINARY, seed) for seed in seeds for method in (PLAIN, MSE, LOGPROB)),
        *(Run(method, task, 0) for task in (TOPICS, ANSWERS, OBEYING) for method in main),
        *(Run(method, UNCLIPPED, 0) for method in (PLAIN, MSE)),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in strong),
        *(Run(method, HARSH, seed) for seed in seeds for method in strong),
        *(Run(KL_STRONG, ORDINARY, seed) for seed in seeds),
        *(Run(KL_STRONG, task, 0) for task in (TOPICS, ANSWERS, OBEYING)),
        *(Run(KL_STRONG_RANDOM, setting, 0) for setting in (HARSH, HARSHEST)),
        *(Run(method, OBEYING, seed) for seed in seeds for method in (PLAIN, KL_STRONG)),
        *(Run(KL_STRONG_ANCHORED, task, 0) for task in (OBEYING, ANSWERS)),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in (ANCHORED, BUDGET)),
    ]


@dataclass(frozen=True)
class Plan:
    """Runs in the order in which they are done: what matters most first."""

    runs: tuple[Run, ...] = field(default_factory=lambda: tuple(dict.fromkeys(_everything())))
    chains: tuple[Chain, ...] = CHAINS


def plan_order() -> list[tuple[str, str]]:
    """Names of setting and method of every run, what matters most first."""
    return [(run.setting.name, run.method.name) for run in Plan().runs]
