"""What entries share: sizes, cases, and how a method's FLOPs, peak and time are taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.families import FAMILIES, family_batch, family_objective
from benchmarks.rows import FLOPS, PEAK, TIME, Check, Cost, Kind, Results
from benchmarks.today import switch_checkpointing_on
from costbp.cost.step import forward_only, wall_seconds
from costbp.estimators.base import Estimator
from costbp.meter import Meter
from costbp.models.loss import cross_entropy
from costbp.objective import Batch, Key, Objective

Run = Callable[[], object]

KEY = Key(0, 0)
FORWARD = "forward"
KINDS: dict[str, Kind] = {FLOPS: "flops", TIME: "time", PEAK: "memory"}


@dataclass(frozen=True)
class Size:
    """Size of the models, batches, and how long a case is timed.

    Attributes:
        shapes: (rows, tokens of a row) of a batch.
        small, large: shapes for the batched forward of zeroth order.
        seconds: timing of a case ends after these, but not before ``least`` rounds.
        judged: whether times and peaks are held against targets; both mean little at small sizes.
    """

    hidden: int = 768
    layers: int = 4
    heads: int = 12
    vocabulary: int = 1024
    shapes: tuple[tuple[int, int], ...] = ((1, 64), (8, 64))
    small: tuple[int, int] = (1, 16)
    large: tuple[int, int] = (8, 32)
    seconds: float = 3.0
    least: int = 3
    judged: bool = True


FULL = Size()
QUICK = Size(
    hidden=128,
    layers=2,
    heads=4,
    vocabulary=128,
    shapes=((2, 8),),
    small=(1, 8),
    large=(4, 24),
    seconds=0.0,
    least=1,
    judged=False,
)


@dataclass(frozen=True)
class Case:
    """One model with one batch."""

    family: str
    rows: int
    length: int
    objective: Objective
    batch: Batch

    @property
    def label(self) -> str:
        return f"{self.family} {self.rows}x{self.length}"

    def estimate(self, estimator: Estimator) -> Run:
        """A run that makes one estimate."""
        return lambda: estimator.estimate(self.objective, [self.batch], KEY)


@dataclass(frozen=True)
class Count:
    """FLOPs and peak bytes beyond weights of one run."""

    flops: int
    peak: int


@dataclass
class Rounds:
    """Wall times of several runs, measured alternately."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, base: str = FORWARD) -> float:
        """Median over rounds of one run's time over another's in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(runs: Mapping[str, Run], budget: float, least: int, device: str) -> Rounds:
    """Time ``runs`` in rounds of one call each, every second round backwards, until ``budget``
    seconds are over. Whatever else the machine does disturbs all of a round alike."""
    rounds = Rounds({name: [] for name in runs})
    start, done = time.perf_counter(), 0
    while done < least or time.perf_counter() - start < budget:
        for name in list(runs) if done % 2 == 0 else reversed(list(runs)):
            rounds.seconds[name].append(wall_seconds(runs[name], torch.device(device)))
        done += 1
    return rounds


@dataclass
class Measured:
    """Counts and times of the methods of one case."""

    counts: dict[str, Count]
    rounds: Rounds | None

    def units(self, name: str) -> float:
        return self.counts[name].flops / self.counts[FORWARD].flops

    def peak(self, name: str) -> float:
        return self.counts[name].peak / self.counts[FORWARD].peak

    def times(self, name: str, base: str = FORWARD) -> float | None:
        timed = self.rounds is not None and name in self.rounds.seconds
        return self.rounds.ratio(name, base) if timed and self.rounds else None


@dataclass
class Bench:
    """A run of the benchmarks: settings, models built so far, and results."""

    size: Size = FULL
    device: str = "cpu"
    results: Results = field(default_factory=Results)
    _objectives: dict[tuple[str, bool], Objective] = field(default_factory=dict)

    def objective(self, family: str, checkpointed: bool = False) -> Objective:
        """The family's model, with LoRA of rank 1 on queries and values; built once.

        Args:
            checkpointed: whether transformers' own gradient checkpointing is on.
        """
        if (family, checkpointed) not in self._objectives:
            size = self.size
            module = family_objective(
                family,
                hidden=size.hidden,
                layers=size.layers,
                heads=size.heads,
                vocabulary=size.vocabulary,
                attention="eager",  # stock forward mode has no rule for the fused kernel
            ).module
            if checkpointed:
                switch_checkpointing_on(module)
            objective = Objective(module.to(self.device), cross_entropy)
            self._objectives[family, checkpointed] = objective
        return self._objectives[family, checkpointed]

    def case(self, family: str, rows: int, length: int) -> Case:
        """The family's model with a batch."""
        data = family_batch(family, rows, length, self.size.vocabulary)
        batch = {name: tensor.to(self.device) for name, tensor in data.items()}
        return Case(family, rows, length, self.objective(family), batch)

    def cases(self) -> Iterator[Case]:
        """Every family at every shape."""
        for rows, length in self.size.shapes:
            for family in FAMILIES:
                yield self.case(family, rows, length)

    def count(self, case: Case, run: Run) -> Count:
        """FLOPs of a run, and its peak beyond all models' weights and the batch."""
        objectives = (case.objective, *self._objectives.values())
        existing = [tensor for objective in objectives for tensor in objective.existing()]
        with Meter([*existing, *case.batch.values()]) as meter:
            run()
        return Count(meter.flops, meter.peak)

    def measure(
        self,
        entry: str,
        case: Case,
        ours: Mapping[str, Run],
        today: Mapping[str, Run],
        timed: bool = True,
    ) -> Measured:
        """Count one run of every method of a case, then time them, and note costs."""
        runs: dict[str, Run] = {
            FORWARD: lambda: forward_only(case.objective, case.batch),
            **ours,
            **today,
        }
        runs[FORWARD]()  # whatever a model caches is there from here on
        counts = {name: self.count(case, run) for name, run in runs.items()}
        size = self.size
        rounds = interleaved(runs, size.seconds, size.least, self.device) if timed else None
        measured = Measured(counts, rounds)
        for name in (*ours, *today):
            cost = Cost(
                entry,
                case.label,
                name,
                name in today,
                measured.units(name),
                measured.times(name),
                measured.peak(name),
            )
            self.results.costs.append(cost)
        return measured

    def hold(self, case: Case, measured: Measured, method: str, **targets: float) -> None:
        """Check a method's FLOPs (``flops=``), time (``time=``) and peak (``memory=``), each
        in those of a forward."""
        values = {
            FLOPS: measured.units(method),
            TIME: measured.times(method),
            PEAK: measured.peak(method),
        }
        for quantity, value in values.items():
            kind = KINDS[quantity]
            if kind in targets and value is not None:
                self.check(method, quantity, kind, case.label, value, targets[kind])

    def check(
        self,
        what: str,
        quantity: str,
        kind: Kind,
        case: str,
        measured: float | None,
        target: float | None,
        at_least: bool = False,
    ) -> None:
        """Note a number, and hold it against its target where the size allows that."""
        if measured is None:
            return
        if not self.size.judged and (kind == "time" or quantity == PEAK):
            target = None
        self.results.checks.append(Check(what, quantity, kind, case, measured, target, at_least))
