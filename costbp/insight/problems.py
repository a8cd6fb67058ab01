"""What is measured on: an objective and one batch that stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from costbp.config.insight import Quadratic, Trained
from costbp.config.study import Plan
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.data.stream import BatchStream
from costbp.errors import UserError
from costbp.insight.points import settings
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.objective import Batch, Objective


@dataclass(frozen=True)
class Bench:
    """A problem that is ready: its objective, its batch, theta at the start and the gradient there,
    both [d]."""

    name: str
    objective: Objective
    batch: Batch
    home: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, plan: Plan, name: str) -> Bench:
        """The problem of a name.

        Raises:
            UserError: its task has too few examples.
        """
        insight = settings(plan)
        spec = insight.problems[name]
        if isinstance(spec, Quadratic):
            return cls.made(name, *quadratic(spec))
        return cls.made(name, *trained(plan, spec, insight.seed))

    @classmethod
    def made(cls, name: str, objective: Objective, batch: Batch) -> Bench:
        gradient = objective.gradient(batch)[1].clone()
        return cls(name, objective, batch, objective.theta.clone(), gradient)

    @property
    def d(self) -> int:
        return self.objective.d


class Parameters(nn.Module):
    """A vector of ones that is trained."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(d, dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        return self.vector


def quadratic(spec: Quadratic) -> tuple[Objective, Batch]:
    """The objective, in float64, and a batch that holds its curvatures [d]."""
    curvatures = torch.arange(1, spec.d + 1, dtype=torch.float64) ** -spec.decay
    objective = Objective(
        Parameters(spec.d), lambda theta, batch: theta.square() @ batch["curvatures"] / 2
    )
    return objective, {"curvatures": curvatures}


def trained(plan: Plan, spec: Trained, seed: int) -> tuple[Objective, Batch]:
    """A model as it is before its first step, without dropout, and a batch of its training split."""
    pair = Pair.of(plan, spec.model, spec.task)
    data = load_prepared(prepare(pair))
    split = data.splits["train"]
    if len(split) < spec.examples:
        raise UserError(f"task '{spec.task}' has {len(split)} examples, not {spec.examples}")
    module = build_model(
        pair.model, len(data.names), pair.assets, seed, data.width, words=data.words
    )
    batch = BatchStream(split, spec.examples, seed)[0]
    return Objective(module.eval(), cross_entropy), batch
