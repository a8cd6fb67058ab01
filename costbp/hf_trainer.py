"""transformers' ``Trainer`` with gradients by any method of the catalog."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from costbp.errors import UserError
from costbp.own_loop import Method, Steps


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` that asks a method for gradients instead of backpropagating. Optimiser,
    schedule, clipping, evaluation, checkpoints and callbacks are the Trainer's own. What an estimator
    remembers (masks, calibrated scales) begins anew where the Trainer continues from a checkpoint.

    Args:
        method: of the catalog; it must look at one batch a step, as all do but for accumulation and
            SVRG.

    Raises:
        UserError: the method or the arguments ask for several batches a step, or for several GPUs.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        entry = method.entry
        if entry.accumulate > 1 or entry.svrg is not None:
            raise UserError(
                "the Trainer hands out one batch a step: no method with accumulation or SVRG"
            )
        if self.args.gradient_accumulation_steps > 1 or self.args.n_gpu > 1:
            raise UserError(
                "gradient_accumulation_steps and n_gpu must be 1: estimates don't add up"
            )
        self.method = method
        self._steps: Steps | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Leave the estimate in the parameters' ``.grad``; returns the loss []."""
        model.train()
        if self._steps is None:
            self._steps = self.method.on(model, self._loss, seed=self.args.seed)
        self._steps.step = self.state.global_step
        return self._steps.estimate(self._prepare_inputs(inputs)).loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs))
        assert isinstance(loss, Tensor)
        return loss
