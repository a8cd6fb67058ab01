"""When a run is scored, with which parameters, and when it has diverged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from costbp.config.entries import Strict


class Evaluation(Strict):
    """When a run is evaluated, and when it counts as diverged."""

    points: tuple[float, ...] = Field(
        min_length=1, description="Fractions of the budget at which the validation split is scored."
    )
    batch_size: int = Field(64, ge=1, description="Examples per evaluation batch.")

    @field_validator("points")
    @classmethod
    def _ordered(cls, points: tuple[float, ...]) -> tuple[float, ...]:
        if list(points) != sorted(set(points)) or points[0] < 0 or points[-1] != 1:
            raise ValueError("points must rise from 0 or more to exactly 1")
        return points

    keep: Literal["best", "last"] = Field(
        "best",
        description="Which parameters are scored on the test split: those of the evaluation with the "
        "best validation accuracy (the lower loss among equals), or the last.",
    )
    diverged_at: float = Field(
        10.0, gt=1, description="Smoothed training loss over its first value that ends a run."
    )
