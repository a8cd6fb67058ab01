"""The one training loop: it runs any estimator on one vector, until a budget is spent.

A run's state is (theta, optimiser state, counters, rows). Data order, directions, dropout masks
and initial weights are functions of (seed, step), so a resumed run continues bit-equal.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.methods import OptimizerSpec
from costbp.config.study import RunSpec
from costbp.estimators import Estimate, build_estimator
from costbp.measure.step import CostCounter, StepCost, resident_bytes
from costbp.models.loss import cross_entropy
from costbp.models.prepare import Prepared
from costbp.models.weights import load_tokenizer
from costbp.objective import Batch, Key, Objective
from costbp.tasks.base import load_task
from costbp.tasks.encoded import Split
from costbp.train.record import Outcome, Summary
from costbp.train.scores import Scorer, Scores, Scoring, to_device

SMOOTHING = 0.9  # of the training loss that decides on divergence


class Interrupted(Exception):
    """The run was asked to stop; its state has been saved."""


def build_optimizer(theta: Tensor, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """A torch optimiser that steps the flat vector."""
    if spec.name == "adamw":
        return torch.optim.AdamW([theta], lr=spec.lr, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        [theta], lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


class BatchStream:
    """Training batches by number: epoch after epoch, each in an order of its own; an incomplete
    last batch is left out. Batch i is a function of (seed, i)."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self.split, self.size, self.seed = split, batch_size, seed
        self.per_epoch = len(split) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = Key(self.seed, epoch, (0,)).generator()
            self._order = torch.randperm(len(self.split), generator=generator)
            self._epoch = epoch
        return self.split.batch(self._order[place * self.size : (place + 1) * self.size])


@dataclass
class State:
    """Counters and rows of a run so far; all of it goes into a checkpoint."""

    step: int = 0
    batches: int = 0  # batches looked at
    units: float = 0.0
    flops: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_bytes: int = 0
    non_finite: int = 0
    resumed: int = 0
    evaluated: int = 0  # evaluation points passed
    first_loss: float | None = None
    smooth_loss: float | None = None
    rows: list[dict[str, float | int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after each step."""

    fraction: float
    state: State
    loss: float
    accuracy: float | None


Watcher = Callable[[Progress], None]


class Run:
    """One seed of one experiment.

    Args:
        spec: the frozen spec.
        module: what is trained.
        data: encoded splits.
        device: where it runs.
        costs: counter shared by runs of one experiment, whose steps cost the same.
        assets: folder of what was fetched, for the tokenizer that reads written answers.
    """

    def __init__(
        self,
        spec: RunSpec,
        module: nn.Module,
        data: Prepared,
        device: torch.device,
        costs: CostCounter | None = None,
        assets: Path = Path(),
    ) -> None:
        self.spec, self.data, self.device = spec, data, device
        self.module = module.to(device)
        self.objective = Objective(self.module, cross_entropy)
        self.estimator = build_estimator(spec.method)
        self.optimizer = build_optimizer(self.objective.theta, spec.optimizer)
        self.stream = BatchStream(data.splits["train"], spec.task.batch_size, spec.seed)
        self.state = State()
        self.cost_of = costs or CostCounter(self.estimator)
        self.scorer = Scorer(
            data,
            load_task(spec.task.loader),
            spec.evaluation.batch_size,
            device,
            partial(load_tokenizer, spec.model, assets),
        )

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "hash": self.spec.hash,
            "theta": self.objective.theta,
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict(),
            "state": vars(self.state),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: it was saved by a run with another spec.
        """
        if saved["hash"] != self.spec.hash:
            raise ValueError("the checkpoint belongs to another run")
        self.objective.theta.copy_(saved["theta"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.estimator.load_state_dict(saved["estimator"])
        self.state = State(**saved["state"])
        self.state.resumed += 1

    # --- one step ------------------------------------------------------------------------------

    def batches(self) -> list[Batch]:
        """The batches of the next step."""
        state = self.state
        numbers = range(len(self.estimator.passes(state.step)))
        return [to_device(self.stream[state.batches + i], self.device) for i in numbers]

    def spent(self, ahead: StepCost | None = None) -> float:
        """Share of the budget spent, including a step ``ahead``."""
        budget, state = self.spec.budget, self.state
        if budget.forward_units is None:
            return (state.step + (ahead is not None)) / budget.amount
        return (state.units + (ahead.units if ahead else 0.0)) / budget.amount

    def step(self, batches: list[Batch], key: Key, cost: StepCost) -> Estimate:
        """One estimate and one optimiser step, timed."""
        state = self.state
        start = self._clock()
        estimate = self.estimator.estimate(self.objective, batches, key)
        self.objective.theta.grad = estimate.gradient
        self.optimizer.step()
        state.seconds += self._clock() - start
        state.step += 1
        state.batches += len(batches)
        state.units += cost.units
        state.flops += cost.flops
        state.peak_bytes = max(state.peak_bytes, cost.peak_bytes)
        state.non_finite += estimate.non_finite
        return estimate

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # --- the loop ------------------------------------------------------------------------------

    def train(self, watch: Watcher) -> tuple[Outcome, str]:
        """Spend the budget. The last step is the last that fits into it."""
        state, points = self.state, self.spec.evaluation.points
        accuracy = None
        while True:
            key = Key(self.spec.seed, state.step)
            batches = self.batches()
            cost = self.cost_of(self.objective, batches, key)
            if self.spent(cost) > 1 + 1e-9:
                break
            while state.evaluated < len(points) and points[state.evaluated] <= self.spent() + 1e-12:
                accuracy = self._evaluate()
                state.evaluated += 1
            estimate = self.step(batches, key, cost)
            loss = float(estimate.loss)
            self._log(estimate, loss)
            outcome = self._diverged(loss)
            watch(Progress(self.spent(), state, loss, accuracy))
            if outcome:
                return "diverged", outcome
        if not state.step:
            raise ValueError(
                f"the budget of {self.spec.budget.amount:g} {self.spec.budget.unit} is below the "
                f"{cost.units:.2f} forward units of a single step"
            )
        while state.evaluated < len(points):
            if state.evaluated == len(points) - 1:
                self._evaluate()
            state.evaluated += 1
        return "completed", ""

    def _log(self, estimate: Estimate, loss: float) -> None:
        derivatives, state = estimate.derivatives, self.state
        row: dict[str, float | int | None] = {
            "step": state.step,
            "forward_units": state.units,
            "flops": state.flops,
            "seconds": state.seconds,
            "loss": loss,
            "gradient_norm": estimate.norm,
        }
        if len(derivatives):
            row["derivative_rms"] = float(derivatives.square().mean().sqrt())
        state.rows.append(row)

    def _diverged(self, loss: float) -> str:
        state, limit = self.state, self.spec.evaluation.diverged_at
        if not (math.isfinite(loss) and self.objective.finite()):
            return f"loss or parameters not finite at step {state.step}"
        if state.first_loss is None or state.smooth_loss is None:
            state.first_loss = state.smooth_loss = loss
        state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * loss
        if state.smooth_loss > limit * max(state.first_loss, 1e-3):
            return f"training loss above {limit:g} times its start at step {state.step}"
        return ""

    def _evaluate(self) -> float:
        found, state = self._score("validation", self.spec.task.scoring), self.state
        state.rows.append(
            {
                "step": state.step,
                "forward_units": state.units,
                "flops": state.flops,
                "seconds": state.seconds,
                "validation_accuracy": found.accuracy,
                "validation_loss": found.loss,
            }
        )
        return found.accuracy

    def _score(self, split: str, scoring: Scoring) -> Scores:
        start = self._clock()
        found = self.scorer(self.module, split, scoring)
        self.state.evaluation_seconds += self._clock() - start
        return found

    def _tested(self) -> tuple[Scores, dict[str, float]]:
        """The test split scored as the task says, and all its metrics; those of a language model
        that chooses among names also the other way."""
        scoring = self.spec.task.scoring
        main = self._score("test", scoring)
        metrics = dict(main.metrics)
        if self.spec.model.writes_text and self.data.names:
            other: Scoring = "generation" if scoring == "likelihood" else "likelihood"
            for name, value in self._score("test", other).metrics.items():
                metrics[f"{name}_by_{other}"] = value
        return main, metrics

    # --- what is recorded ------------------------------------------------------------------------

    def resident(self) -> dict[str, int]:
        """Bytes that stay between steps, by category."""
        kept = sum(tensor.nbytes for tensor in self.estimator.state_dict().values())
        return resident_bytes(self.objective, self.optimizer, kept)

    def summary(self, *, test: bool) -> Summary:
        """Figures of the run as it stands; scores the test split if asked to."""
        state = self.state
        accuracies = [r["validation_accuracy"] for r in state.rows if "validation_accuracy" in r]
        losses = [r["validation_loss"] for r in state.rows if "validation_loss" in r]
        tested, metrics = self._tested() if test else (None, {})
        resident = self.resident()
        weights = resident.pop("weights")
        return Summary(
            test_accuracy=tested.accuracy if tested else None,
            test_loss=_finite(tested.loss) if tested else None,
            test_metrics=metrics,
            validation_accuracy=accuracies[-1] if accuracies else None,
            validation_loss=_finite(losses[-1]) if losses else None,
            best_validation_accuracy=max((a for a in accuracies if a is not None), default=None),
            steps=state.step,
            forward_units=state.units,
            flops=state.flops,
            seconds=state.seconds,
            evaluation_seconds=state.evaluation_seconds,
            peak_bytes=state.peak_bytes,
            state_bytes=sum(resident.values()),
            weights_bytes=weights,
            rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            d=self.objective.d,
            majority=self.data.facts["majority"]["test"],
            resumed=state.resumed,
            non_finite=state.non_finite,
        )


def _finite(value: float | int | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
