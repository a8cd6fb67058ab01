"""What is measured: a value with its interval, beside what theory predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from costbp.analysis.statistics import interval
from costbp.config.entries import Strict
from costbp.config.insight import Insight
from costbp.config.study import Plan
from costbp.errors import UserError

Question = Literal["cosine", "error", "rate", "slow_down", "curvature"]


class Point(Strict):
    """A mean over repeats. ``predicted`` is the formula of the estimate's error, or for rates and steps
    that of d; ``by_rank`` is the latter with the effective rank in place of d."""

    problem: str
    question: Question
    series: str
    oracle: str = ""
    d: int
    count: int = Field(description="Directions K; 0: the gradient itself.")
    repeats: int
    measured: float
    low: float
    high: float | None
    predicted: float | None = None
    by_rank: float | None = None
    given_up: int = Field(
        0, description="Repeats without an end: all values are then bounds below."
    )

    @classmethod
    def of(cls, values: Sequence[float], factors: bool = False, **about: Any) -> Point:
        """The point of values, one a repeat; of ``factors`` mean and interval are those of logarithms."""
        found = interval([math.log(v) for v in values] if factors else values)
        mean, low, high = (math.exp(value) for value in found) if factors else found
        last = None if about.get("given_up") else high
        return cls(repeats=len(values), measured=mean, low=low, high=last, **about)


def settings(plan: Plan) -> Insight:
    """The study's `insight`.

    Raises:
        UserError: it has none.
    """
    if plan.study.insight is None:
        raise UserError(f"study '{plan.name}' has no `insight`; config/config.yaml has one")
    return plan.study.insight


def path_of(plan: Plan, problem: str) -> Path:
    """Where the workflow keeps a problem's points."""
    return plan.results / "insight" / f"{problem}.json"
