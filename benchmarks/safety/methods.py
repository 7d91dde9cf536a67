"""Define what is compared: a `Method` is how refusals are kept, a `Setting` how a model is tuned.

A `Run` is one of each and a seed; its result has its name, so that no run is done twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from str_kernels.settings import ConstraintSettings


@dataclass(frozen=True)
class Method(ConstraintSettings):
    """How refusals are kept: the settings of the constraint, and these.

    Args:
        name: what the results call it.
        loss: ``"plain"`` (cross-entropy alone), ``"str"`` (the package's constraint), ``"pact"``
            (gated subset KL, arXiv 2603.07445), ``"full_kl"`` (KL over the whole vocabulary),
            ``"constrained_sft"`` (arXiv 2406.05946), or ``"safe_lora"`` (plain, and the adapter is
            projected afterwards, arXiv 2405.16833).
        top_k: K.
        tokens: ``"identified"``, ``"random"`` (the control) or ``"templates"`` (the words that the
            rejection templates have most often).
        anchors: pairs of rows joined to every batch, a refused request and a benign look-alike
            with the aligned answers: constrained at every position, nothing learned from them.
        built_in: the anchors are the package's own requests, which the aligned model answers; else
            they come from the two sources of what is asked.
        alone: the anchors are constrained as heavily as a batch, whose own rows are not.
        mixed: refused rows that are learned among the data (Safety-Tuned LLaMAs, arXiv 2309.07875).
    """

    name: str
    loss: str = "str"
    kind: str = field(default="mse", kw_only=True)
    strength: float = field(default=0.1, kw_only=True)
    top_k: int = 64
    tokens: str = "identified"
    anchors: int = 0
    built_in: bool = False
    alone: bool = False
    mixed: int = 0

    @property
    def needs(self) -> str:
        """What it takes besides the aligned model and the task's rows."""
        if self.mixed:
            return "refused requests to learn"
        if self.anchors and not self.built_in:
            return "refused requests and look-alikes"
        return "the model before alignment" if self.loss == "safe_lora" else ""


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
        """What the results call it."""
        return f"{self.setting.name}--{self.method.name}--seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"method": asdict(self.method), "setting": asdict(self.setting), "seed": self.seed}


PLAIN = Method("plain", loss="plain", strength=0.0)
MSE = Method("mse")
LOGPROB = Method("logprob", kind="logprob")
KL = Method("kl", kind="kl", strength=10.0)  # the default
KL_MASS = Method("kl-mass", kind="kl_mass", strength=10.0)
KL_MASS_ANCHORED = Method("kl-mass-anchors", kind="kl_mass", strength=10.0, anchors=1)
KL_MASS_STRONG = Method("kl-mass-30", kind="kl_mass", strength=30.0)
KL_STRONG = Method("kl-30", kind="kl", strength=30.0)
KL_WEAK = Method("kl-weak", kind="kl", strength=1.0)
PACT = Method("pact", loss="pact", kind="kl", strength=1.0, positions="labels", top_k=50)
FULL_KL = Method("full-kl", loss="full_kl", kind="kl", strength=1.0)
FULL_KL_STRONG = Method("full-kl-10", loss="full_kl", kind="kl", strength=10.0)
CONSTRAINED_SFT = Method("constrained-sft", loss="constrained_sft", strength=0.0)
SAFE_LORA = Method("safe-lora", loss="safe_lora", strength=0.0)
# a tenth of the rows that the obedient setting learns
MIXED = Method("safeinstr", loss="plain", strength=0.0, mixed=37)
BASELINES = (FULL_KL_STRONG, CONSTRAINED_SFT, SAFE_LORA, MIXED)
SHARES = tuple(
    Method(f"{kind.replace('_', '-')}-share-{share:g}", kind=kind, strength=10.0, share=share)
    for kind in ("kl", "kl_mass")
    for share in (0.5, 0.25)
)
ANCHORED = Method("mse-anchors", anchors=1)
KL_ANCHORED = Method("kl-anchors", kind="kl", strength=10.0, anchors=1)
# no rows of the user's: the requests by which safety tokens are found
BUILT_IN = tuple(
    Method(
        f"{kind.replace('_', '-')}-{name}",
        kind=kind,
        strength=10.0,
        anchors=2,
        built_in=True,
        alone=alone,
    )
    for kind in ("kl", "kl_mass")
    for name, alone in (("built-in-anchors", False), ("anchors-alone", True))
)
ALONE = tuple(method for method in BUILT_IN if method.alone)
# side by side on the report's page
HELD = (
    KL,
    KL_STRONG,
    KL_ANCHORED,
    KL_MASS,
    KL_MASS_STRONG,
    KL_MASS_ANCHORED,
    *BUILT_IN,
    *SHARES,
    MSE,
    LOGPROB,
)
COMPARED = (PLAIN, *HELD, PACT, FULL_KL, *BASELINES)
KL_WEAK_ANCHORED = Method("kl-weak-anchors", kind="kl", strength=1.0, anchors=1)
KL_RANDOM = Method("kl-random-tokens", kind="kl", strength=10.0, tokens="random")
# one change each to kl at 10
ABLATIONS = (
    *(replace(KL, name=f"kl-k{top_k}", top_k=top_k) for top_k in (16, 256)),
    replace(KL, name="kl-template-tokens", tokens="templates"),
    *(
        replace(KL, name=f"kl-{name}", positions=p)
        for name, p in (("first-2", 2), ("labels", "labels"))
    ),
)
RANDOM = Method("mse-random-tokens", tokens="random")
# Past methods, which the package no longer has: a constraint that only kept logits from falling, a
# strength that followed a budget of drift, one target for all positions, one divergence of K + 1
# outcomes, the mass held where there are labels alone. They are named for the order of the report;
# their settings are in the results (docs/negative-results.md).
PAST = FLOOR, BUDGET, STATIC, KL_REST, KL_REST_ANCHORED, KL_MASS_AT_LABELS = tuple(
    Method(name)
    for name in ["floor", "budget", "mse-static", "kl-rest", "kl-rest-anchors", "kl-mass-at-labels"]
)
CONTROLS = (RANDOM, Method("mse-labels", positions="labels"), STATIC)
STRONG = Method("mse-strong", strength=1.0)

HARSH = Setting("sst2-harsh", "sst2", 2e-3)
ORDINARY = Setting("sst2-ordinary", "sst2", 5e-4)
HARSHEST = Setting("sst2-harshest", "sst2", 3e-3)
UNCLIPPED = replace(HARSHEST, name="sst2-unclipped", max_grad_norm=0.0)
TOPICS = Setting("agnews-harsh", "agnews", 2e-3, pool=400)
ANSWERS = Setting("instructions-harsh", "instructions", 2e-3, pool=374)
OBEYING = Setting("obedient-harsh", "obedient", 2e-3, pool=374)
ALONE_ON = (OBEYING, HARSHEST, TOPICS, ANSWERS, HARSH)


@dataclass(frozen=True)
class Chain:
    """Fine-tunings in a row, each adapter merged before the next; the first model is reference."""

    method: Method
    settings: tuple[Setting, ...]
    seed: int

    @property
    def name(self) -> str:
        """What the results call it."""
        return f"in-a-row--{self.method.name}--seed{self.seed}"

    @property
    def runs(self) -> tuple[Run, ...]:
        """Its fine-tunings, in order."""
        return tuple(Run(self.method, setting, self.seed) for setting in self.settings)


IN_A_ROW = tuple(replace(s, steps=50) for s in (HARSH, TOPICS, ANSWERS))
CHAINS = tuple(Chain(method, IN_A_ROW, 0) for method in (PLAIN, MSE, KL, KL_MASS_STRONG))


def _everything() -> list[Run]:
    """List every run, past ones too: the main comparison first, then the harshest setting."""
    seeds, main = range(3), (PLAIN, MSE, KL_WEAK, LOGPROB)
    others = (ANCHORED, KL_WEAK_ANCHORED, BUDGET, FLOOR, FULL_KL, STRONG)
    strong = (KL, KL_ANCHORED)
    return [
        *(Run(method, HARSH, seed) for seed in seeds for method in main),
        *(Run(method, HARSH, 0) for method in (FLOOR, PACT, *CONTROLS)),
        *(Run(RANDOM, HARSH, seed) for seed in seeds),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in main),
        *(Run(method, HARSHEST, 0) for method in others),
        *(Run(method, ORDINARY, seed) for seed in seeds for method in (PLAIN, MSE, LOGPROB)),
        *(Run(method, task, 0) for task in (TOPICS, ANSWERS, OBEYING) for method in main),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in strong),
        *(Run(method, HARSH, seed) for seed in seeds for method in strong),
        *(Run(KL, ORDINARY, seed) for seed in seeds),
        *(Run(KL, task, 0) for task in (TOPICS, ANSWERS, OBEYING)),
        *(Run(KL_RANDOM, setting, 0) for setting in (HARSH, HARSHEST)),
        *(Run(method, OBEYING, seed) for seed in seeds for method in (PLAIN, KL)),
        *(Run(KL_ANCHORED, task, 0) for task in (OBEYING, ANSWERS)),
        *(Run(method, HARSHEST, seed) for seed in seeds for method in (ANCHORED, BUDGET)),
        *(Run(KL_REST, setting, 0) for setting in (OBEYING, HARSHEST)),
        Run(KL_REST_ANCHORED, OBEYING, 0),
        Run(KL_MASS_AT_LABELS, HARSHEST, 0),
        *(Run(method, OBEYING, 0) for method in (*BASELINES, *SHARES, LOGPROB)),
        *(Run(method, HARSHEST, 0) for method in (*BASELINES, *SHARES, *ABLATIONS)),
        *(Run(KL_MASS, task, seed) for seed in seeds for task in (HARSHEST, OBEYING, HARSH)),
        *(Run(KL_MASS, task, seed) for seed in seeds for task in (TOPICS, ANSWERS)),
        *(Run(KL_MASS_ANCHORED, task, seed) for seed in seeds for task in (OBEYING, HARSHEST)),
        *(Run(KL_MASS_STRONG, task, seed) for seed in seeds for task in (OBEYING, HARSHEST, HARSH)),
        *(Run(KL_MASS_STRONG, task, 0) for task in (TOPICS, ANSWERS)),
        *(Run(KL_STRONG, task, seed) for seed in seeds for task in (OBEYING, HARSHEST)),
        *(Run(method, UNCLIPPED, 0) for method in (PLAIN, KL)),
        *(Run(method, task, 0) for task in (OBEYING, HARSHEST) for method in BUILT_IN),
        *(Run(method, task, seed) for seed in seeds for task in ALONE_ON for method in ALONE),
    ]


@dataclass(frozen=True)
class Plan:
    """Runs in the order in which they are done: what matters most first."""

    runs: tuple[Run, ...] = tuple(r for r in dict.fromkeys(_everything()) if r.method not in PAST)
    chains: tuple[Chain, ...] = CHAINS


def plan_order() -> list[tuple[str, str]]:
    """Return the names of setting and method of every run, past ones included."""
    return [(run.setting.name, run.method.name) for run in _everything()]
