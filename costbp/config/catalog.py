"""The vocabulary that studies combine: one pydantic model per kind of catalog entry.

An entry's identity is everything that can change a result. Text for readers (label, citation,
notes) is marked cosmetic and stays out of the hash of a run, so that mending a label recomputes
nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["bp", "fmad", "zo"]


class Strict(BaseModel):
    """Immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Strict):
    """A catalog entry; ``label``, ``citation`` and ``notes`` are for readers only."""

    cosmetic: ClassVar[set[str]] = {"label", "citation", "notes"}

    label: str = Field(description="Name used in tables and figures.")
    citation: str | None = Field(None, description="Where the entry comes from.")
    notes: str | None = Field(None, description="What a reader should know about it.")

    def identity(self) -> dict[str, Any]:
        """What a run's hash is made of: the entry without its cosmetic fields."""
        return self.model_dump(mode="json", exclude=self.cosmetic)


def short_hash(value: Any) -> str:
    """First eight hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- methods ---------------------------------------------------------------------------------


class BackpropSpec(Strict):
    """Reverse mode under a memory plan."""

    kind: Literal["backprop"]
    plan: Literal["none", "per_block"] = Field(
        "none",
        description="`none` stores every activation; `per_block` recomputes each block in backward.",
    )


class ExactOracle(Strict):
    """Exact directional derivative by forward-mode AD."""

    kind: Literal["exact"]
    chunk: int | None = Field(
        None, ge=1, description="Directions carried at a time; default: all at once."
    )


class CentralOracle(Strict):
    """Central difference of two losses, `(f(theta + eps z) - f(theta - eps z)) / (2 eps)`."""

    kind: Literal["central"]
    eps: float = Field(1e-3, gt=0, description="Step of the difference.")


class DirectionSpec(Strict):
    """Where directions come from and how many are averaged."""

    kind: Literal["gaussian"] = "gaussian"
    count: int = Field(1, ge=1, description="Directions K per estimate.")


class ProjectedSpec(Strict):
    """Gradient from directional derivatives: mean over K of (derivative along z) z."""

    kind: Literal["projected"]
    oracle: Annotated[ExactOracle | CentralOracle, Field(discriminator="kind")]
    directions: DirectionSpec = DirectionSpec()


class OptimizerSpec(Strict):
    """A torch optimiser on the flat parameter vector."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0, description="Learning rate.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only.")
    weight_decay: float = Field(0.0, ge=0)


class MethodEntry(Entry):
    """How a step's gradient is obtained, and the optimiser it is given to."""

    family: Family = Field(description="Groups methods in figures and claims.")
    estimator: Annotated[BackpropSpec | ProjectedSpec, Field(discriminator="kind")]
    accumulate: int = Field(1, ge=1, description="Micro-batches averaged before a step.")
    optimizer: OptimizerSpec = Field(description="Default where no tuned choice exists.")
    trials: tuple[OptimizerSpec, ...] = Field(
        min_length=1, description="What `tune` tries: the same number for every method of a study."
    )
    reference: bool = Field(
        False, description="True for the BP variant that claims compare the others with."
    )

    cosmetic: ClassVar[set[str]] = Entry.cosmetic | {"optimizer", "trials", "reference", "family"}


# --- models ----------------------------------------------------------------------------------


class AssetSource(Strict):
    """A transformers folder inside a fetched asset."""

    kind: Literal["asset"]
    asset: str = Field(description="Name in assets.yaml.")
    folder: str = Field(".", description="Folder of the model inside the asset.")


class RandomSource(Strict):
    """An architecture with seeded random weights; words are hashed to token ids."""

    kind: Literal["random"]
    model_type: str = Field(description="transformers model type, for example `bert`.")
    config: dict[str, int | float | str | bool] = Field(description="Overrides of its config.")
    seed: int = 0


class LoraTraining(Strict):
    """LoRA adapters (Hu et al. 2021) and the classification head are trained, the base is frozen."""

    kind: Literal["lora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(min_length=1, description="Names of the adapted linears.")


class HeadTraining(Strict):
    """Only the head is trained, on features of the frozen base, computed once and cached."""

    kind: Literal["head"]


class ModelEntry(Entry):
    """Weights, and which part of them is trained."""

    source: Annotated[AssetSource | RandomSource, Field(discriminator="kind")]
    train: Annotated[LoraTraining | HeadTraining, Field(discriminator="kind")]
    pooling: Literal["mean", "first", "last"] = Field(
        "mean", description="How token states become the feature vector that the head reads."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the base model in training.")

    @property
    def reads_features(self) -> bool:
        """Whether the model is trained on cached features of its frozen base."""
        return isinstance(self.train, HeadTraining)

    @property
    def asset(self) -> str | None:
        """Name of the asset that holds the weights, if any."""
        return self.source.asset if isinstance(self.source, AssetSource) else None


# --- tasks, budgets, assets --------------------------------------------------------------------


class TaskEntry(Entry):
    """Examples, fixed splits and a batch size."""

    loader: str = Field(description="Module in `costbp/tasks/` that reads the examples.")
    asset: str | None = Field(None, description="Name in assets.yaml; none: installed packages.")
    batch_size: int = Field(ge=1)
    max_length: int = Field(ge=4, description="Tokens; longer examples are cut and counted.")
    validation: int = Field(ge=1, description="Examples of the validation split.")
    test: int = Field(ge=1, description="Examples of the test split.")
    split_seed: int = Field(0, description="Seed of the one shuffle behind the splits.")


class BudgetEntry(Entry):
    """A stopping rule: exactly one of `forward_units` and `steps`."""

    forward_units: float | None = Field(None, gt=0, description="No-grad forwards of one batch.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps.")

    @model_validator(mode="after")
    def _one_rule(self) -> BudgetEntry:
        if (self.forward_units is None) == (self.steps is None):
            raise ValueError("set exactly one of 'forward_units' and 'steps'")
        return self

    @property
    def unit(self) -> str:
        return "forward units" if self.forward_units is not None else "steps"

    @property
    def amount(self) -> float:
        """The limit, in `unit`s."""
        return float(self.forward_units if self.forward_units is not None else self.steps or 0)

    def scaled(self, fraction: float) -> BudgetEntry:
        """The same rule with `fraction` of the limit, for tuning trials."""
        if self.forward_units is not None:
            return self.model_copy(update={"forward_units": self.forward_units * fraction})
        return self.model_copy(update={"steps": max(1, round((self.steps or 1) * fraction))})


class AssetEntry(Entry):
    """A PyPI package fetched as data: never installed, only the members named here are kept."""

    package: str
    version: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the wheel.")
    licence: str
    members: dict[str, str] = Field(
        min_length=1, description="Path inside the wheel -> path inside the asset's folder."
    )


class Catalog(Strict):
    """All entries by name."""

    methods: dict[str, MethodEntry]
    models: dict[str, ModelEntry]
    tasks: dict[str, TaskEntry]
    budgets: dict[str, BudgetEntry]
    assets: dict[str, AssetEntry]
