"""Small objectives, and their gradient by reverse mode in float64: what estimators are held to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.families import family_batch, family_objective
from costbp.estimators.memory_plans import PLANS
from costbp.objective import Batch, Objective
from costbp.train.loop import Run, State, StepEvent
from tests.conftest import Lift64

ON_CPU = {name: plan for name, plan in PLANS.items() if name != "offload"}  # that has a GPU's sense
SIZE = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 64}  # 16 entries a head, as RoPE needs


def in_dtype(objective: Objective, data: Batch, dtype: torch.dtype) -> tuple[Objective, Batch]:
    """The same model and batch in another dtype."""
    moved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    return Objective(objective.module.to(dtype), objective.loss), moved


def small_model(
    family: str, dtype: torch.dtype = torch.float64, **options
) -> tuple[Objective, Batch]:
    """A two-block model of a family and a batch of 2 x 8 tokens."""
    data = family_batch(family, 2, 8, SIZE["vocabulary"])
    return in_dtype(family_objective(family, **SIZE | options), data, dtype)


def train_until(run: Run, reached: Callable[[State], bool]) -> None:
    """Train a run until its state is as asked for, and leave it there."""

    class Halt(Exception):
        pass

    def halt(event: StepEvent) -> None:
        if reached(event.state):
            raise Halt

    with pytest.raises(Halt):
        run.train(halt)


def reference(objective: Objective, data: Batch) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [d] by ``torch.autograd.grad``, not by the objective's own buffer."""
    parameters = dict(objective.module.named_parameters())
    with Lift64():
        loss = objective.value(data)
        parts = torch.autograd.grad(
            loss, [parameters[name] for name in objective.slices], materialize_grads=True
        )
    return loss.detach(), torch.cat([part.reshape(-1) for part in parts])


class Network(nn.Module):
    """Two tanh layers, smooth everywhere."""

    def __init__(self, width: int = 4, hidden: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.second(torch.tanh(self.first(batch["features"])))


def class_loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"])


def network(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int) -> Objective:
    torch.manual_seed(seed)
    return Objective(Network(**sizes).to(dtype), class_loss)


def examples(n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """A batch for ``network()``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 4, generator=generator).to(dtype)
    return {"features": features, "labels": torch.randint(0, 3, (n,), generator=generator)}


class Tensors(nn.Module):
    """Parameters of given shapes, drawn from a seed; returns them as one vector."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )

    def forward(self, batch: Batch) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.parts])


def linear_objective(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Objective:
    """A loss g . theta: the batch holds its gradient ``g`` [d]."""
    return Objective(Tensors(list(shapes)).to(dtype), lambda theta, batch: theta @ batch["g"])
