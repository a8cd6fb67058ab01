"""What a step of an estimator costs: counted FLOPs and bytes, and measured seconds.

``CostCounter`` counts the steps of a run as they come, ``measure_step`` a typical step of any
estimator on any objective: with real or random weights, or on meta without any.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from costbp.config.cards import CARDS, Work
from costbp.cost.allocator import replayed
from costbp.cost.categories import Categories
from costbp.device import synchronise
from costbp.estimators.base import Estimator
from costbp.estimators.update import decide, made
from costbp.meter import Meter, Timeline
from costbp.objective import Batch, Key, Objective

WARM_UP = 3  # steps of a kind whose time isn't typical


@dataclass(frozen=True)
class Count:
    """What is counted of one step.

    Attributes:
        flops: floating-point operations of matrix products, counted as they run.
        forward_flops: the same for one no-grad forward of one batch, mean over the step's batches.
        peak_bytes: largest number of bytes alive at once beyond parameters, gradient buffer,
            optimiser state and batch.
        at_peak: those bytes by category (``cost/categories.py``).
        work: operators by FLOPs and bytes moved, where that was asked for.
        timeline: of all storages that came and went.
    """

    flops: int
    forward_flops: float
    peak_bytes: int
    at_peak: Mapping[str, int] = field(default_factory=dict)
    work: Work = field(default_factory=dict)
    timeline: Timeline | None = None

    @property
    def units(self) -> float:
        """Forward units: FLOPs in no-grad forwards of one batch."""
        return self.flops / self.forward_flops


@torch.no_grad()
def forward_only(objective: Objective, batch: Batch) -> None:
    """The unit: one forward of one batch, whole, without a graph."""
    objective.loss(objective.module(batch), batch)


def forward_flops(objective: Objective, batch: Batch, known: dict[Any, float]) -> float:
    """FLOPs of a forward of one batch; ``known`` by the batch's shape, and added to.

    Raises:
        ValueError: it runs no matrix product that could serve as the unit.
    """
    shape = _shape(batch)
    if shape not in known:
        with Meter() as forward:
            forward_only(objective, batch)
        known[shape] = forward.flops
    if not known[shape]:
        raise ValueError("the forward pass runs no matrix product: forward units are undefined")
    return known[shape]


def frozen_bytes(objective: Objective) -> list[int]:
    """Of each storage of frozen weights and buffers."""
    trained = objective.theta.untyped_storage()._cdata
    tensors = [*objective.module.parameters(), *objective.module.buffers()]
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return [size for key, size in found.items() if key != trained]


def resident_bytes(
    objective: Objective, optimizer: torch.optim.Optimizer, estimator_state: int
) -> dict[str, int]:
    """Bytes that stay between steps, by category: frozen weights and buffers, adapters (whatever is
    trained), gradients, and the state of the optimiser and of the estimator (given)."""
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "weights": sum(frozen_bytes(objective)),
        "adapters": objective.theta.nbytes,
        "gradients": 0 if objective.sparing else objective.buffer.nbytes,
        "optimiser state": estimator_state
        + sum(t.nbytes for t in moments if isinstance(t, torch.Tensor)),
    }


class CostCounter:
    """Cost of steps, counted once per shape of batch and phase of the estimator, on estimates
    that are thrown away.

    Args:
        named: say what the bytes at the peak are for, which takes up to half of a trace's time;
            if not, leave a forward that isn't known uncounted.
        forwards: FLOPs of a forward by shape of batch, where they are shared with others.

    Attributes:
        timelines: of the estimates counted.
        state_bytes: what the estimator keeps between steps, as far as counted steps showed.
    """

    def __init__(
        self,
        estimator: Estimator,
        *,
        named: bool = True,
        forwards: dict[Any, float] | None = None,
    ) -> None:
        self.named, self.timelines = named, list[Timeline]()
        self._forwards = {} if forwards is None else forwards
        self.estimator = copy.deepcopy(estimator)  # never run itself: it remembers nothing
        self._known: dict[tuple[Any, ...], Count] = {}
        self._begun: Estimator | None = None  # one that remembers a first step
        self.state_bytes = 0

    def __call__(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Count:
        """Cost of step ``key.step`` on its ``batches``. Inner estimates run one after the other,
        so FLOPs add up; the peak is the largest, with what wrappers hold meanwhile."""
        estimator = self.estimator.per_batch
        costs, flops, work = [], 0, Counter[tuple[bool, float, float]]()
        for batch, passes in zip(batches, self.estimator.passes(key.step), strict=True):
            difference = estimator.difference
            wide = difference is not None and difference.float32
            known = (_shape(batch), estimator.phase(key.step), wide)
            if known not in self._known:
                trial = self._trial(objective, batch, key)
                self._known[known] = self._count(trial, objective, batch, key)
                synchronise(objective.theta.device)  # not on the next step's time
                own = sum(tensor.nbytes for tensor in trial.state_dict().values())
                wrappers = self.estimator.kept * objective.theta.nbytes
                self.state_bytes = max(self.state_bytes, own + wrappers)
            costs.append(self._known[known])
            flops += passes * costs[-1].flops
            for kind, count in costs[-1].work.items():
                work[kind] += passes * count  # type: ignore[assignment]
        held = self.estimator.scratch * objective.theta.nbytes
        largest = max(costs, key=lambda cost: cost.peak_bytes)
        return Count(
            flops=flops,
            forward_flops=statistics.mean(cost.forward_flops for cost in costs),
            peak_bytes=largest.peak_bytes + held,
            timeline=largest.timeline,
            at_peak={**largest.at_peak, **({"gradients": held} if held else {})},
            work=work,
        )

    def follow(self, estimator: Estimator) -> None:
        """Count differences as ``estimator`` has settled them."""
        ours, theirs = self.estimator.difference, estimator.difference
        if ours is not None and theirs is not None and vars(ours) != vars(theirs):
            ours.eps, ours.float32, self._begun = theirs.eps, theirs.float32, None

    def _count(self, trial: Estimator, objective: Objective, batch: Batch, key: Key) -> Count:
        """One estimate on one batch; theta is left as it was."""
        if self.named:
            forward_flops(objective, batch, self._forwards)
        step = Meter([*objective.existing(), *batch.values()])
        step.work = {} if self.named else None
        names = Categories(step, objective) if self.named else contextlib.nullcontext()
        with names, step:
            made(trial, objective, [batch], key)
        self.timelines.append(step.timeline())
        return Count(
            flops=step.flops,
            forward_flops=self._forwards.get(_shape(batch), math.nan),
            peak_bytes=step.peak,
            at_peak=step.at_peak(),
            work=step.work or {},
            timeline=self.timelines[-1],
        )

    def _trial(self, objective: Objective, batch: Batch, key: Key) -> Estimator:
        """An estimator to count with: fresh for steps like the first, else one that has made it."""
        fresh = copy.deepcopy(self.estimator.per_batch)
        if fresh.phase(key.step) == fresh.phase(0):
            return fresh
        if self._begun is None:
            fresh.estimate(objective, [batch], replace(key, step=0))
            self._begun = fresh
        return copy.deepcopy(self._begun)


def _shape(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in batch.values())


def typical_seconds(estimator: Estimator, spans: Sequence[float]) -> float | None:
    """A typical optimiser step of a run whose steps took ``spans``: each kind of step (of SVRG, of
    calibrations) by its median after the first few, kinds by how often they occur. None without
    any step."""
    kinds: dict[Any, list[float]] = {}
    for step, span in enumerate(spans):
        kind = (estimator.passes(step), estimator.per_batch.phase(step))
        kinds.setdefault(kind, []).append(span)
    usual = [(len(s), statistics.median(s[WARM_UP:] or s)) for s in kinds.values()]
    return sum(count * seconds for count, seconds in usual) / len(spans) if spans else None


@dataclass(frozen=True)
class StepCost:
    """A typical optimiser step: FLOPs, units and seconds are means over the estimator's cycle, bytes
    those of its largest step, seconds medians (None unless asked for); ``seconds_by_card`` go by
    published peaks, ``allocated`` and ``reserved`` what a GPU's allocator would hand out and keep
    (``cost/allocator.py``)."""

    forward_units: float
    flops: float
    forward_flops: float
    peak_bytes: int
    peak_by_category: dict[str, int]
    weights_bytes: int
    state_bytes: int
    d: int
    seconds_by_card: dict[str, float]
    seconds: float | None = None
    forward_seconds: float | None = None
    allocated: int | None = None
    reserved: int | None = None


def measure_step(
    objective: Objective,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    timed: bool = False,
    counter: CostCounter | None = None,
    replay: bool = False,
) -> StepCost:
    """What an optimiser step costs, all its batches like ``batch``. A first step is made and counts
    for nothing: it fills what optimiser and estimator remember, and moves theta.

    Args:
        counter: of the estimator, where its own is wanted.
        replay: say what a GPU's allocator would hand out and keep, too.
        timed: run every kind of step of the estimator's cycle, too, and take its time.
    """
    decide(objective, estimator, optimizer)
    counter, steps = counter or CostCounter(estimator), range(1, estimator.cycle + 1)
    keys = [Key(0, step) for step in steps]
    batches = [[batch] * len(estimator.passes(step)) for step in steps]
    counts = [counter(objective, *given) for given in zip(batches, keys, strict=True)]
    update = Meter(objective.existing())
    update.work = {}
    with update:
        if not objective.sparing:
            objective.theta.grad = objective.buffer
            optimizer.step()
        elif objective.theta.is_meta:
            objective.theta.add_(objective.theta)  # what all blocks' steps move
    seconds: tuple[float | None, float | None] = (None, None)
    if timed:
        device = objective.theta.device
        estimator.estimate(objective, [batch] * len(estimator.passes(0)), Key(0, 0))
        spent: dict[int, float] = {}  # by FLOPs: steps that count the same take the same time
        for count, given, key in zip(counts, batches, keys, strict=True):
            if count.flops not in spent:
                once = partial(made, estimator, objective, given, key)
                spent[count.flops] = median_seconds(once, device)
        forward = median_seconds(partial(forward_only, objective, batch), device)
        seconds = statistics.mean(spent[count.flops] for count in counts), forward
    resident = resident_bytes(objective, optimizer, counter.state_bytes)
    largest = max(counts, key=lambda count: count.peak_bytes)
    names = dict.fromkeys((*resident, *largest.at_peak))
    taken: tuple[int | None, int | None] = (None, None)
    if replay:
        own = (size for name, size in resident.items() if name != "weights")
        taken = replayed([*frozen_bytes(objective), *own], largest.timeline)
    return StepCost(
        forward_units=statistics.mean(count.units for count in counts),
        flops=statistics.mean(count.flops for count in counts),
        forward_flops=counts[0].forward_flops,
        peak_bytes=largest.peak_bytes,
        peak_by_category={n: resident.get(n, 0) + largest.at_peak.get(n, 0) for n in names},
        weights_bytes=resident["weights"],
        state_bytes=sum(resident.values()) - resident["weights"],
        d=objective.d,
        seconds_by_card=seconds_by_card(
            *((1 / len(counts), c.work) for c in counts), (1, update.work)
        ),
        seconds=seconds[0],
        forward_seconds=seconds[1],
        allocated=taken[0],
        reserved=taken[1],
    )


def seconds_by_card(*works: tuple[float, Work]) -> dict[str, float]:
    """Seconds of a step by card; each work with how often a step does it."""
    return {
        name: sum(times * card.seconds(work) for times, work in works)
        for name, card in CARDS.items()
    }


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one ``run()``, with the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


CPU = torch.device("cpu")


def median_seconds(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Median wall time of ``run()`` after one warm-up: seven calls, or as many as fit into a
    second, at least one."""
    run()
    times = [wall_seconds(run, device)]
    while len(times) < 7 and sum(times) < 1:
        times.append(wall_seconds(run, device))
    return statistics.median(times)
