"""All that is measured of one problem."""

from __future__ import annotations

from collections.abc import Iterator

from costbp.config.study import Plan
from costbp.errors import UserError, suggest
from costbp.insight.descent import descent
from costbp.insight.estimates import estimates
from costbp.insight.points import Point, settings
from costbp.insight.problems import Bench


def measure(plan: Plan, name: str) -> Iterator[Point]:
    """The points of a problem, as they are found.

    Raises:
        UserError: the study has no such problem, or its task too few examples.
    """
    insight = settings(plan)
    if name not in insight.problems:
        raise UserError(f"insight.problems: no '{name}'; {suggest(name, insight.problems)}")
    spec = insight.problems[name]
    bench = Bench.of(plan, name)
    counts = spec.counts or insight.counts
    yield from estimates(bench, insight, spec.directions or list(insight.directions), counts)
    if spec.descent:
        yield from descent(bench, insight, counts)
