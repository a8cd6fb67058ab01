"""Claims as data: what is claimed, by whom, and the reading by which the runs test it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from costbp.config.entries import Strict


class _Claim(Strict):
    title: str = Field(description="Name in tables.")
    statement: str = Field(description="What is claimed, in one sentence.")
    source: str = Field(description="Who claims it, where.")
    provenance: Literal["quoted", "derived"] = Field(
        description="Whether the statement is the source's or follows from it."
    )
    claimed: str = Field(description="The claimed value, in words.")


class ReferenceClaim(_Claim):
    """The reference against every FmAD and ZO method, by accuracy, time or computations."""

    reading: Literal[
        "accuracy_gap",
        "time_to_same_accuracy",
        "flops_to_same_accuracy",
        "flops_per_step",
        "gap_grows_with_d",
        "zo_needs_least_memory",
    ] = Field(description="How the runs are asked.")


class MemoryClaim(_Claim):
    """The reference's memory against that of every FmAD and ZO method."""

    reading: Literal["memory_comparable"] = Field(description="How the runs are asked.")
    tolerance: float = Field(gt=0, description="Ratio up to which memories are comparable.")


class VariantClaim(_Claim):
    """Methods against the plain method of their family."""

    reading: Literal["beats_its_baseline"] = Field(description="How the runs are asked.")
    baselines: dict[str, str] = Field(
        min_length=1, description="Method -> method of its family that it is compared with."
    )


Claim = Annotated[ReferenceClaim | MemoryClaim | VariantClaim, Field(discriminator="reading")]
Claims = dict[str, Claim]
