"""The optimiser that an estimate is given to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from costbp.config.entries import Strict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Name = Literal["adamw", "sgd"]
LEAST_RATE = 1e-5  # the least that is published for zeroth order with adapters


class OptimizerSpec(Strict):
    """A torch optimiser on the flat parameter vector."""

    name: Name = Field("adamw", description="Of torch's.")
    lr: float = Field(gt=0, description="Learning rate.")
    falls_from: int | None = Field(
        None,
        ge=1,
        description="d up to which `lr` holds; for a longer trainable vector it falls as 1/d, as "
        "the largest stable step of a projected estimate does, to 1e-5 at the least.",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only.")
    weight_decay: float = Field(0.0, ge=0, description="As torch's optimiser applies it.")

    def rate(self, d: int) -> float:
        """The learning rate for d trainable parameters."""
        if self.falls_from is None or d <= self.falls_from:
            return self.lr
        return min(self.lr, max(self.lr * self.falls_from / d, LEAST_RATE))

    def build(self, theta: Tensor) -> Optimizer:
        """The optimiser, for the flat vector [d]."""
        import torch

        lr, decay = self.rate(theta.numel()), self.weight_decay
        if self.name == "adamw":
            return torch.optim.AdamW([theta], lr=lr, weight_decay=decay)
        return torch.optim.SGD([theta], lr=lr, momentum=self.momentum, weight_decay=decay)
