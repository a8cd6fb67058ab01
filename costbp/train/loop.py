"""The one training loop: it runs any estimator on one vector, until a budget is spent.

A run's state is (theta, optimiser state, counters, rows). Data order, directions, dropout masks
and initial weights are functions of (seed, step), so a resumed run continues bit-equal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.study import RunSpec
from costbp.console import say
from costbp.cost.ceiling import Arrangement
from costbp.cost.step import (
    CostCounter,
    Count,
    forward_only,
    median_seconds,
    resident_bytes,
    typical_seconds,
)
from costbp.data.prepare import Prepared
from costbp.data.stream import BatchStream
from costbp.device import allocator_peaks, forget_peaks, free, synchronise, to_device
from costbp.estimators.probe import COARSE, Probe, settle
from costbp.estimators.update import decide, update
from costbp.models.loss import LOSSES
from costbp.models.weights import load_tokenizer
from costbp.objective import Batch, Key, Objective
from costbp.tasks.base import load_task
from costbp.train.record import NOISE, Outcome, Summary
from costbp.train.scores import Scorer, Scores, Scoring

SMOOTHING = 0.9  # of the training loss that decides on divergence
ALLOCATOR_STEPS = 5  # after these the allocator is asked where a step is larger than all before


class Interrupted(Exception):
    """The run was asked to stop; its state has been saved."""


@dataclass
class State:
    """Counters and rows of a run so far; all of it goes into a checkpoint."""

    step: int = 0
    batches: int = 0  # batches looked at
    units: float = 0.0
    flops: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    counting_seconds: float = 0.0
    peak_bytes: int = 0
    non_finite: int = 0
    resumed: int = 0
    evaluated: int = 0  # evaluation points passed
    best: tuple[float, float, int] | None = None  # accuracy, minus loss and step of what is kept
    first_loss: float | None = None
    smooth_loss: float | None = None
    allocated: int = 0
    reserved: int = 0
    probe: dict[str, Any] | None = None  # of the method's differences
    rows: list[dict[str, float | int | None]] = field(default_factory=list)

    @property
    def spent(self) -> dict[str, float | int | None]:
        """What a row says of where it is."""
        return {
            "step": self.step,
            "forward_units": self.units,
            "flops": self.flops,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class StepEvent:
    """What a watcher is told after each step."""

    fraction: float
    state: State
    loss: float
    accuracy: float | None


Watcher = Callable[[StepEvent], None]


class Run:
    """One seed of one experiment.

    Args:
        spec: the frozen spec.
        module: what is trained.
        data: encoded splits.
        device: where it runs.
        assets: folder of what was fetched, for the tokenizer that reads written answers.
        arrangement: how estimates are computed under a ceiling; None: as the method is set.
    """

    def __init__(
        self,
        spec: RunSpec,
        module: nn.Module,
        data: Prepared,
        device: torch.device,
        assets: Path = Path(),
        arrangement: Arrangement | None = None,
    ) -> None:
        self.spec, self.data, self.device = spec, data, device
        self.module = module.to(device)
        self.objective = Objective(self.module, LOSSES[spec.task.objective])
        self.estimator, self.arrangement = spec.method.build(), arrangement
        if arrangement is not None:
            self.estimator = arrangement.arrange(self.estimator, self.objective)
        if self.estimator.difference is not None and not spec.task.differentiable:
            self.estimator.difference.eps = self.estimator.difference.eps or COARSE
        self.optimizer = spec.optimizer.build(self.objective.theta)
        decide(self.objective, self.estimator, self.optimizer)
        self.stream = BatchStream(data.splits["train"], spec.task.batch_size, spec.seed)
        self.state = State()
        self.kept: Tensor | None = None  # theta [d] at the best evaluation
        self.cost_of = CostCounter(self.estimator)  # runs whose steps cost the same may share one
        self.scorer = Scorer(
            data,
            load_task(spec.task.loader),
            spec.evaluation.batch_size,
            device,
            partial(load_tokenizer, spec.model, assets),
            self.objective.loss,
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
            "kept": self.kept,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            Exception: of any kind; it is another's, or no state. The run may hold parts of it then.
        """
        theta, counters = self.objective.theta, saved["state"]
        if saved["hash"] != self.spec.hash or saved["theta"].shape != theta.shape:
            raise ValueError("the checkpoint belongs to another run")
        if counters.keys() != vars(self.state).keys():
            raise ValueError("the checkpoint has other counters")
        theta.copy_(saved["theta"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for moments in self.optimizer.state.values():  # read at each step: the host's
            if "step" in moments:
                moments["step"] = moments["step"].cpu()
        self.estimator.load_state_dict(saved["estimator"])
        self.state, self.kept = State(**counters), saved["kept"]
        self.state.resumed += 1
        if self.state.probe is not None:
            Probe(**self.state.probe).adopt(self.estimator)
            self.cost_of.follow(self.estimator)

    # --- one step ------------------------------------------------------------------------------

    def batches(self) -> list[Batch]:
        """The batches of the next step."""
        start, passes = self.state.batches, self.estimator.passes(self.state.step)
        return [to_device(self.stream[start + i], self.device) for i in range(len(passes))]

    def spent(self, ahead: Count | None = None) -> float:
        """Share of the budget spent, including a step ``ahead``."""
        budget, state = self.spec.budget, self.state
        if budget.forward_units is None:
            return (state.step + (ahead is not None)) / budget.amount
        return (state.units + (ahead.units if ahead else 0.0)) / budget.amount

    def step(self, batches: list[Batch], key: Key, cost: Count) -> list[float]:
        """One estimate and one optimiser step, timed; returns the estimate's figures, and the sum of
        theta as the last. Reading them is the one time that the host waits for the device."""
        state = self.state
        largest = cost.peak_bytes > state.peak_bytes or state.step < ALLOCATOR_STEPS
        if largest:
            forget_peaks(self.device)
        start = time.perf_counter()
        estimate = self.estimator.estimate(self.objective, batches, key)
        figures = update(self.objective, self.optimizer, estimate)
        total = self.objective.theta.sum(dtype=figures.dtype)
        found: list[float] = torch.cat([figures, total.reshape(1)]).tolist()
        state.seconds += time.perf_counter() - start
        if largest:
            peaks = allocator_peaks(self.device)
            state.allocated, state.reserved = map(max, peaks, (state.allocated, state.reserved))
        state.step += 1
        state.batches += len(batches)
        state.units += cost.units
        state.flops += cost.flops
        state.peak_bytes = max(state.peak_bytes, cost.peak_bytes)
        return found

    # --- the loop ------------------------------------------------------------------------------

    def train(self, watch: Watcher) -> tuple[Outcome, str]:
        """Spend the budget. The last step is the last that fits into it."""
        state, points, accuracy = self.state, self.spec.evaluation.points, None
        self._settle()
        while True:
            key = Key(self.spec.seed, state.step)
            batches = self.batches()
            start = time.perf_counter()
            cost = self.cost_of(self.objective, batches, key)
            state.counting_seconds += time.perf_counter() - start
            if self.spent(cost) > 1 + 1e-9:
                break
            while state.evaluated < len(points) and points[state.evaluated] <= self.spent() + 1e-12:
                accuracy = self._evaluate()
                state.evaluated += 1
            loss, norm, size, dropped, total = self.step(batches, key, cost)
            state.non_finite += int(dropped)
            self._log(loss, norm, size)
            outcome = self._diverged(loss, total)
            watch(StepEvent(self.spent(), state, loss, accuracy))
            if outcome:
                return "diverged", outcome
        if not state.step:
            raise ValueError(
                f"the budget of {self.spec.budget.amount:g} {self.spec.budget.unit} is below the "
                f"{cost.units:.2f} forward units of a single step"
            )
        if state.evaluated < len(points):
            self._evaluate()
            state.evaluated = len(points)
        source = getattr(self.estimator.per_batch, "source", None)
        return "completed", source.caution(self.objective) if source else ""

    def _settle(self) -> None:
        """Before the first step: how the method takes its differences, if it takes any."""
        state, device = self.state, self.device
        if state.step or state.probe is not None or not self.spec.task.differentiable:
            return
        start = time.perf_counter()
        probe = settle(self.objective, self.estimator, self.batches()[0], Key(self.spec.seed, 0))
        if probe is not None:
            state.probe = vars(probe)
            self.cost_of.follow(self.estimator)
            free(device)
            if probe.snr <= NOISE:
                title = "/".join(self.spec.cell)
                say(
                    f"warning: {title} seed {self.spec.seed}: the differences of this model are mostly "
                    f"noise: signal to noise {probe.snr:.2g} at the best step, eps = {probe.eps:g}"
                )
        synchronise(device)
        state.evaluation_seconds += time.perf_counter() - start

    def _log(self, loss: float, norm: float, size: float) -> None:
        state = self.state
        row: dict[str, float | int | None] = {**state.spent, "loss": loss, "gradient_norm": norm}
        if not math.isnan(size):
            row["derivative_rms"] = size
        state.rows.append(row)

    def _diverged(self, loss: float, total: float) -> str:
        state, limit = self.state, self.spec.evaluation.diverged_at
        if not (math.isfinite(loss) and math.isfinite(total)):
            return f"loss or parameters not finite at step {state.step}"
        if state.first_loss is None or state.smooth_loss is None:
            state.first_loss = state.smooth_loss = loss
        state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * loss
        least = math.log(max(2, len(self.data.names)))  # a constant answer's: a batch may be lucky
        if state.smooth_loss > limit * max(state.first_loss, least):
            return f"training loss above {limit:g} times its start at step {state.step}"
        return ""

    def _evaluate(self) -> float:
        found, state = self._score("validation", self.spec.task.scoring), self.state
        state.rows.append(
            state.spent | {"validation_accuracy": found.accuracy, "validation_loss": found.loss}
        )
        self._keep(found)
        return found.accuracy

    def _keep(self, found: Scores) -> None:
        """Remember the parameters of the best evaluation, the first among equals."""
        state, score = self.state, (found.accuracy, -found.loss)
        better = state.best is None or score > state.best[:2]
        if self.spec.evaluation.keep == "best" and better and math.isfinite(found.loss):
            state.best = (*score, state.step)
            self.kept = self.objective.theta.clone()

    @contextlib.contextmanager
    def _best(self) -> Iterator[int]:
        """Within the block theta is what the test split is scored with: gives the step it is of."""
        if self.kept is None or self.state.best is None:
            yield self.state.step
            return
        with self.objective.returning():
            self.objective.theta.copy_(self.kept)
            yield self.state.best[2]

    def _score(self, split: str, scoring: Scoring) -> Scores:
        start = time.perf_counter()
        found = self.scorer(self.module, split, scoring)
        self.state.evaluation_seconds += time.perf_counter() - start
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
        with self._best() as scored:
            usable = test and self.objective.finite()
            tested, metrics = self._tested() if usable else (None, {})
        resident = self.resident()
        weights = resident.pop("weights")
        probe = Probe(**state.probe) if state.probe is not None else None
        return Summary(
            test_accuracy=tested.accuracy if tested else None,
            test_loss=_finite(tested.loss) if tested else None,
            test_metrics=metrics,
            scored_step=scored if tested else None,
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
            learning_rate=self.spec.optimizer.rate(self.objective.d),
            eps=getattr(self.estimator.difference, "step", None),
            float32=probe is not None and probe.float32,
            difference_snr=probe.snr if probe else None,
            difference_cosine=probe.cosine if probe else None,
            probe_forwards=probe.forwards if probe else 0,
            counting_seconds=state.counting_seconds,
            step_seconds=self._step_seconds(),
            forward_seconds=self._forward_seconds() if test else None,
            allocated_bytes=state.allocated or None,
            reserved_bytes=state.reserved or None,
            **(self.arrangement.figures if self.arrangement else {}),
        )

    def _step_seconds(self) -> float | None:
        ends: list[Any] = [row["seconds"] for row in self.state.rows if "loss" in row]
        spans = [end - start for start, end in itertools.pairwise([0.0, *ends])]
        return typical_seconds(self.estimator, spans)

    def _forward_seconds(self) -> float:
        once = partial(forward_only, self.objective, self.batches()[0])
        return median_seconds(once, self.device)


def _finite(value: float | int | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
