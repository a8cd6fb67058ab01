"""Claims as data: what is claimed, by whom, and the reading by which the runs test it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from costbp.config.costs import card_bytes
from costbp.config.entries import EntryName, Strict, short_hash
from costbp.config.methods import Family

Unit = Literal["points", "percent", "percent less", "percent faster", "x"]


class Magnitude(Strict):
    """A claimed "up to"."""

    value: float = Field(gt=0, description="As the source gives it.")
    units: tuple[Unit, ...] = Field(
        min_length=1,
        description="What the source may mean by it; where readings disagree, it is undecided.",
    )


class Traced(Strict):
    """Steps traced at full size, without weights, for this claim."""

    models: tuple[str, ...] = Field(min_length=1, description="Names in models.yaml.")
    methods: tuple[str, ...] = Field(min_length=2, description="Names in methods.yaml.")
    batch: int = Field(1, ge=1, description="Examples a batch.")
    seq: int = Field(256, ge=2, description="Tokens an example.")

    def file(self, model: str) -> str:
        """Name of the file that holds a model's traces."""
        name = f"{model}-{self.batch}x{self.seq}-{'+'.join(self.methods)}"
        return (name if len(name) <= 200 else f"{name[:190]}-{short_hash(name)}") + ".json"


class Stated(Strict):
    """What every claim has."""

    title: str = Field(description="Name in tables.")
    statement: str = Field(description="What is claimed, in one sentence.")
    source: str = Field(description="Who claims it, where.")
    provenance: Literal["quoted", "derived"] = Field(
        description="Whether the statement is the source's or follows from it."
    )
    claimed: str = Field(description="The claimed value, in words.")
    camp: Literal["study", "other"] = Field(
        "study", description="`study`: of arXiv 2506.21833; `other`: of those who avoid BP."
    )
    takes: str = Field("", description="What a study needs that has nothing to compare.")


class Compared(Stated):
    """Claims that compare methods on the same model, task and budget."""

    models: tuple[str, ...] | None = Field(None, description="Only on these; default: all.")
    tasks: tuple[str, ...] | None = Field(None, description="Only on these; default: all.")
    families: tuple[Family, ...] = Field(
        ("fmad", "zo"), description="Whose methods the reference is compared with."
    )
    methods: tuple[str, ...] | None = Field(None, description="Only these of them.")
    favours: Literal["reference", "other"] = Field(
        "reference", description="Who is claimed to be better, or to need less."
    )
    baselines: dict[str, str] = Field(
        {}, description="Instead of the reference: method -> the one it is claimed to beat."
    )
    magnitude: Magnitude | None = Field(None, description="The claimed size; none: direction only.")


class ScoreClaim(Compared):
    """Who ends with the higher test accuracy."""

    reading: Literal["accuracy_gap"] = Field(description="How the runs are asked.")
    margin: float = Field(0.0, ge=0, description="Points by which the better may be behind.")
    memory: float | None = Field(
        None, ge=1, description="Ratio of peaks, weights included, beyond which none is compared."
    )


class TargetClaim(Compared):
    """Who needs less to reach shares of the reference's gain on the validation split."""

    reading: Literal["to_target", "slowdown_over_d"] = Field(description="How the runs are asked.")
    measure: Literal["seconds", "forward_units", "flops", "depth"] = Field(
        "forward_units",
        description="`depth`: forwards one after the other when all that can runs side by side.",
    )
    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.5, 0.75, 0.9), min_length=1, description="Shares of the gain over the start."
    )
    series: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...] = Field(
        (), description="For `slowdown_over_d`: models that differ in d alone."
    )

    @model_validator(mode="after")
    def _series_for_slopes(self) -> TargetClaim:
        if (self.reading == "slowdown_over_d") != bool(self.series):
            raise ValueError("'series' goes with reading 'slowdown_over_d', and only with it")
        return self


class ScaleClaim(Compared):
    """Whether the reference's lead grows along series of models in which one thing varies."""

    reading: Literal["gap_over_scale"] = Field(description="How the runs are asked.")
    varied: Literal["d", "size"] = Field(
        "d", description="Trained parameters of one base, or bases of different size."
    )
    series: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...] = Field(
        min_length=1, description="Lists of models, each from small to large."
    )


class CostClaim(Compared):
    """What a step needs, the worse over the better: a ratio that lies within bounds."""

    reading: Literal["step_cost"] = Field(description="How the records are asked.")
    measure: Literal["flops", "bytes", "bytes_beyond", "activations", "forward_units"] = Field(
        description="`bytes`: peak with weights; `bytes_beyond`: without; `activations`: without "
        "trained vector, gradient and state, too."
    )
    at_least: float | None = Field(None, gt=0, description="The ratio's lower bound.")
    at_most: float | None = Field(None, gt=0, description="Its upper bound.")
    traced: Traced | None = Field(None, description="Beside the study's own models.")

    @model_validator(mode="after")
    def _a_bound(self) -> CostClaim:
        if self.at_least is None and self.at_most is None:
            raise ValueError("set 'at_least', 'at_most', or both")
        if (self.at_least or 0.0) > (self.at_most or math.inf):
            raise ValueError(f"at_least = {self.at_least:g} is above at_most = {self.at_most:g}")
        return self


class RankingClaim(Stated):
    """Whether two methods change places between two models."""

    reading: Literal["rankings"] = Field(description="How the runs are asked.")
    models: tuple[str, str] = Field(description="The two models.")
    families: tuple[Family, ...] = Field(("fmad", "zo"), description="Whose methods are ranked.")


class SpikeClaim(Compared):
    """Whether directional derivatives spike more than the reference's gradient norm."""

    reading: Literal["spikes"] = Field(description="How the runs are asked.")


class LearnsClaim(Stated):
    """Whether methods rise above where they start."""

    reading: Literal["learns"] = Field(description="How the runs are asked.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Names in tasks.yaml.")
    families: tuple[Family, ...] = Field(("zo",), description="Whose methods are asked.")


class LargestClaim(Stated):
    """Which method trains the larger model within a memory."""

    reading: Literal["largest_model"] = Field(description="How the records are asked.")
    traced: Traced = Field(
        description="Models from small to large; the first method is claimed to."
    )
    memories: tuple[str, ...] = Field(min_length=1, description="Ceilings, as 2GB.")

    @field_validator("memories")
    @classmethod
    def _sizes(cls, memories: tuple[str, ...]) -> tuple[str, ...]:
        for memory in memories:
            card_bytes(memory)
        return memories


class AbsentClaim(Stated):
    """A claim that no run of this project tests."""

    reading: Literal["none"] = Field(description="Not here.")
    reason: str = Field(description="Why not.")


Claim = Annotated[
    ScoreClaim
    | TargetClaim
    | ScaleClaim
    | CostClaim
    | RankingClaim
    | SpikeClaim
    | LearnsClaim
    | LargestClaim
    | AbsentClaim,
    Field(discriminator="reading"),
]
Claims = dict[EntryName, Claim]


class Trace(NamedTuple):
    """One model's traces for claims."""

    model: str
    methods: tuple[str, ...]
    words: str  # options of `costbp cost`


def traces(claims: Claims) -> dict[str, Trace]:
    """What is to be traced for claims, by the name of its file."""
    return {
        part.file(model): Trace(
            model,
            part.methods,
            f"--model {model} --method {','.join(part.methods)} --batch {part.batch} --seq {part.seq}",
        )
        for claim in claims.values()
        if (part := getattr(claim, "traced", None)) is not None
        for model in part.models
    }
