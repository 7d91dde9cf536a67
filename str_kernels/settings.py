"""Settings that a user gives by name: each field states its default, its help and its rule, once.

`ConstraintSettings` are the settings of the safety constraint. The settings of a training run and
those of the patch in a configuration file extend them, and the options of the command line are
built from the fields; a new setting is added here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from str_kernels.options import SafetyConstraint

Positions = Literal["labels", "all"] | int

_ANY_TOKENS = (0, 1)  # no rule of these settings depends on the tokens


class Faults(ValueError):
    """Everything that is wrong with some settings, found before the first slow step."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class Rule(NamedTuple):
    """``text`` completes the sentence "must be …"; ``holds`` tells whether a value obeys it."""

    text: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
    """Require one of these words."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def at_least(least: float) -> Rule:
    """Require a number that is not smaller."""
    return Rule(f"{least:g} or more", lambda value: value >= least)


def above(bound: float) -> Rule:
    """Require a larger number."""
    return Rule(f"above {bound:g}", lambda value: value > bound)


def setting(default: Any, help: str, rule: Rule | None = None, *, option: Any = None) -> Any:
    """Declare a keyword-only field of a dataclass of settings.

    Args:
        default: the value that applies where none is given.
        help: what the setting is for; ``--help`` shows it.
        rule: what every value but a default of None obeys.
        option: the type of the command line's option, where it is not the field's.
    """
    metadata = {"help": help, "rule": rule, "option": option}
    return field(default=default, kw_only=True, metadata=metadata)


def faults_of(settings: Any) -> list[str]:
    """Return a sentence for each field whose value breaks its rule."""
    faults = []
    for item in fields(settings):
        rule, value = item.metadata.get("rule"), getattr(settings, item.name)
        if rule is None or (value is None and item.default is None):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{item.name}={value}: must be a finite number.")
        elif not rule.holds(value):
            faults.append(f"{item.name}={value!r}: must be {rule.text}.")
    return faults


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1


def validate_positions(positions: Positions) -> None:
    """Refuse anything but ``"labels"``, ``"all"`` or a positive integer.

    Raises:
        ValueError: says what is allowed.
    """
    whole = isinstance(positions, int) and not isinstance(positions, bool)
    if positions not in ("labels", "all") and not (whole and positions > 0):
        raise ValueError(
            f"positions={positions!r}: must be 'labels', 'all' or a positive integer k, the first "
            "k labelled positions of each sequence."
        )


@dataclass(frozen=True)
class ConstraintSettings:
    """Every setting of the safety constraint but its tokens.

    A field that ``SafetyConstraint`` has too obeys the rule that is written there; the others are
    arguments of ``patch_model``. Numbers may be given as text.

    Raises:
        Faults: all values outside their rules, together.
    """

    strength: float | None = setting(
        SafetyConstraint.strength,
        "Weight of the constraint; default: 10 for kl and kl_mass, 0.1 for the others.",
        option=str,
    )
    kind: str = setting(
        SafetyConstraint.kind, "What is compared with the reference: kl, kl_mass, mse or logprob."
    )
    temperature: float = setting(
        SafetyConstraint.temperature, "Temperature of the proportions that kl and kl_mass compare."
    )
    positions: str | int = setting(
        "all", "all, labels, or a number k: the first k of each response.", option=str
    )
    reference: str = setting("adapter_off", "adapter_off, or a cache file (str-kernels cache).")
    share: float = setting(
        1.0,
        "Share of the sequences that is constrained: drawn anew for each forward, and weighted so "
        "that the sum is the same on average. The reference pass runs on these alone.",
        Rule("above 0 and at most 1", _is_share),
    )

    def __post_init__(self) -> None:
        """Read numbers that are given as text, then check every field."""
        object.__setattr__(self, "strength", _number(self.strength, float))
        object.__setattr__(self, "positions", _number(self.positions, int))
        if faults := self.faults():
            raise Faults(faults)

    def faults(self) -> list[str]:
        """Return a sentence for each value outside its rule."""
        kind_fault = _refusal(SafetyConstraint, _ANY_TOKENS, kind=self.kind)
        known = {} if kind_fault else {"kind": self.kind}
        others = [name for name in _OF_THE_CONSTRAINT if name != "kind"]
        found = [
            kind_fault,
            *(
                _refusal(SafetyConstraint, _ANY_TOKENS, **known, **{name: getattr(self, name)})
                for name in others
            ),
            _refusal(validate_positions, self.positions),
        ]
        return [fault for fault in found if fault] + faults_of(self)

    def constraint(
        self, token_ids: Iterable[int], token_weights: Iterable[float] | None = None
    ) -> SafetyConstraint:
        """Make the constraint on these tokens.

        Raises:
            ValueError: a constraint of this kind cannot have these tokens.
        """
        own = {name: getattr(self, name) for name in _OF_THE_CONSTRAINT}
        return SafetyConstraint(token_ids, token_weights=token_weights, **own)

    @property
    def of_the_patch(self) -> dict[str, Any]:
        """Return the arguments of ``patch_model`` that belong to the constraint."""
        return {n: getattr(self, n) for n in CONSTRAINT_NAMES if n not in _OF_THE_CONSTRAINT}


CONSTRAINT_NAMES = tuple(item.name for item in fields(ConstraintSettings))
_OF_THE_CONSTRAINT = tuple(
    n for n in CONSTRAINT_NAMES if n in {item.name for item in fields(SafetyConstraint)}
)


def _refusal(check: Callable[..., Any], *args: Any, **keywords: Any) -> str | None:
    """Return the error of a check, or None."""
    try:
        check(*args, **keywords)
    except ValueError as error:
        return str(error)
    return None


def _number(value: Any, kind: type[float] | type[int]) -> Any:
    """Read the number in a text; return anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        return value
