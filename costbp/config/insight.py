"""What `snakemake insight` measures: a part of the study, of which no run depends."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from costbp.config.catalog import Catalog
from costbp.config.entries import EntryName, Seed, Strict, short_hash

Kind = Literal[
    "Gaussian",
    "Rademacher",
    "sphere",
    "orthogonal",
    "coordinate",
    "low rank",
    "sparse",
    "calibrated",
]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class Measured(Strict):
    """What is asked of a problem."""

    counts: Counts | None = Field(None, description="Directions K; default: those of `insight`.")
    directions: tuple[Kind, ...] = Field(get_args(Kind), description="Kinds that are measured.")
    descent: bool = Field(True, description="Measure stable rates and slow-down, too.")


class Quadratic(Measured):
    """Half the sum of curvature times squared parameter, curvatures 1, 2^-decay, ... d^-decay."""

    kind: Literal["quadratic"]
    d: int = Field(ge=2, description="Parameters.")
    decay: float = Field(0.0, ge=0, description="How fast curvatures fall; 0: all are equal.")

    @property
    def title(self) -> str:
        how = f"curvatures i^-{self.decay:g}" if self.decay else "all curvatures 1"
        return f"Quadratic, {how}"


class Trained(Measured):
    """A model on one batch of a task, at its start, without dropout."""

    kind: Literal["model"]
    model: str = Field(description="Name in models.yaml.")
    task: str = Field(description="Name in tasks.yaml.")
    examples: int = Field(8, ge=1, description="Of the batch.")


Problem = Annotated[Quadratic | Trained, Field(discriminator="kind")]


class Insight(Strict):
    """Estimates held against the theory of their variance and of descent with them."""

    problems: dict[EntryName, Problem] = Field(
        min_length=1, description="What is measured, by name."
    )
    counts: Counts = Field((1, 4, 16, 64), description="Directions K; those above d are left out.")
    draws: int = Field(128, ge=2, description="Directions behind a point: draws / K repeats.")
    repeats: int = Field(5, ge=2, description="Repeats of a point at least, each with its seed.")
    descents: int = Field(5, ge=2, description="Repeats of a stable rate and of a slow-down.")
    steps: int = Field(40, ge=2, description="Of a run that shows whether a rate is stable.")
    reach: Counts = Field((8, 32), description="BP's steps to the losses that others must reach.")
    longest: int = Field(5000, ge=1, description="Steps after which a run is given up.")
    seed: Seed = Field(0, description="First seed.")

    def key(self, name: str, catalog: Catalog) -> str:
        """Hash of what a problem's points depend on, but for the data."""
        problem = self.problems[name]
        model = [catalog.models[problem.model].identity()] if isinstance(problem, Trained) else []
        rest = self.model_dump(mode="json", exclude={"problems"})
        return short_hash([problem.model_dump(mode="json"), rest, *model])

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(model, task) of the problems that have one."""
        trained = (p for p in self.problems.values() if isinstance(p, Trained))
        return tuple(dict.fromkeys((problem.model, problem.task) for problem in trained))
