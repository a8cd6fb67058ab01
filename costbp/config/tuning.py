"""How rates are chosen: what is searched, what a trial gave, what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from costbp.config.entries import Entry, Seed, Strict, short_hash
from costbp.config.methods import MethodEntry
from costbp.config.optimizer import Name, OptimizerSpec

Rates = Annotated[tuple[float, ...], Field(min_length=2)]
DEFAULTS: dict[Name, Rates] = {
    "sgd": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "adamw": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}


class Setting(OptimizerSpec):
    """What a trial tries: an optimiser, and the step of the method's differences."""

    eps: float | None = Field(
        None, gt=0, description="Step of the differences, where the search set one."
    )

    @property
    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(**self.model_dump(include=set(OptimizerSpec.model_fields)))

    def but(self, **changes: float) -> Setting:
        """The same setting with another rate or step."""
        return Setting(**self.model_dump(include=set(Setting.model_fields)) | changes)

    def compact(self) -> dict[str, Any]:
        """What isn't a default, the optimiser's name first."""
        return {"name": self.name, **self.model_dump(mode="json", exclude_defaults=True)}


class Trial(Setting):
    """A setting, and what came of it on the validation split."""

    share: float = Field(gt=0, le=1, description="Share of the experiment's budget that it got.")
    accuracy: float | None = Field(None, description="At its end.")
    loss: float | None = Field(None, description="At its end.")
    outcome: str = Field("completed", description="As of a run; one that did not complete loses.")


class Tuned(Strict):
    """The choice for one experiment, and all that it was chosen from."""

    key: str = Field(description="Hash of the settings that the trials were made under.")
    choice: Setting | None = Field(None, description="None where no trial completed.")
    note: str = Field("", description="How the range was extended, and whether that sufficed.")
    trials: tuple[Trial, ...] = Field((), description="In the order in which they were made.")

    def compact(self) -> dict[str, Any]:
        choice = {"choice": self.choice.compact()} if self.choice else {}
        note = {"note": self.note} if self.note else {}
        return {"key": self.key} | choice | note | {"trials": [t.compact() for t in self.trials]}


Choices = dict[str, dict[str, dict[str, dict[str, Tuned]]]]  # model -> task -> method -> budget


class Choice(NamedTuple):
    """The optimiser of an experiment, the step of its differences (None: the method's own), whether
    both come from trials under the study's settings, and where they come from."""

    optimizer: OptimizerSpec
    eps: float | None
    tuned: bool
    source: str


def searches_eps(method: MethodEntry) -> bool:
    """Whether a method's gradients are differences whose step its entry leaves open."""
    return getattr(getattr(method.estimator, "oracle", method.estimator), "eps", 0.0) is None


def with_eps(method: MethodEntry, eps: float | None) -> MethodEntry:
    """The same method with another step of its differences; None leaves it."""
    if eps is None:
        return method
    part: Any = method.estimator
    oracle = getattr(part, "oracle", None)
    inner = {"eps": eps} if oracle is None else {"oracle": oracle.model_copy(update={"eps": eps})}
    return method.model_copy(update={"estimator": part.model_copy(update=inner)})


class Tuning(Strict):
    """How rates are chosen: by successive halving, at the same total for every method."""

    file: Path = Field(description="Committed choices; read when present.")
    first: bool = Field(
        False,
        description="Tune before training, as part of `all`; the choices are then those of the "
        "study's own trials, and `file` is not read.",
    )
    total: int = Field(
        4,
        ge=1,
        le=8,
        description="What an experiment's trials spend, in multiples of its budget, and the number "
        "of rounds: the first tries 2^total settings, each round costs one budget.",
    )
    rates: dict[Name, Rates] = Field(
        DEFAULTS, min_length=1, description="Rates by optimiser, the same for every method."
    )
    eps: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-2, 1e-1),
        description="Steps of differences tried at the best rate, beside that of the probe; methods "
        "without differences try finer rates instead.",
    )
    beyond: int = Field(
        2, ge=0, le=10, description="Decades by which a best rate at an edge may extend the range."
    )
    seed: Seed = Field(1000, description="Seed of the trials, outside the study's seeds.")

    @field_validator("rates")
    @classmethod
    def _rising(cls, rates: dict[Name, Rates]) -> dict[Name, Rates]:
        for name, found in rates.items():
            if list(found) != sorted(set(found)) or not 0 < found[0] < found[-1] <= 1e6:
                raise ValueError(f"rates of {name} must rise, from above 0 to 1e6 at most")
        return rates

    @property
    def trials(self) -> int:
        """Trials of an experiment: 2^total in the first round, half as many in each other."""
        return 2 ** (self.total + 1) - 2

    def roots(self, method: MethodEntry) -> list[Setting]:
        """What the first round begins with: every rate of every optimiser that goes with a method.
        Momentum and weight decay stay as in its entry."""
        own = method.optimizer
        return [
            Setting(**(own.model_dump() if name == own.name else {}) | given)
            for name in sorted(self.rates)
            if name in method.optimizers
            for given in ({"name": name, "lr": lr, "falls_from": None} for lr in self.rates[name])
        ]

    def key(self, method: MethodEntry, others: Sequence[Entry]) -> str:
        """Hash of a search: its space and total, the method, and the ``others`` of an experiment; all
        by what they set beside defaults, so that a new key of an entry ages no choice."""
        roots = [root.compact() for root in self.roots(method)]
        space = [self.total, self.beyond, self.seed, self.eps if searches_eps(method) else []]
        entries = [entry.identity(exclude_defaults=True) for entry in (method, *others)]
        return short_hash([roots, space, *entries])
