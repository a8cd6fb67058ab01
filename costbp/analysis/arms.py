"""Runs as the judge compares them: arms of an experiment, and why two of them can't be compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from costbp.analysis.frames import CELL, Frames
from costbp.config.claims import Compared, ScoreClaim
from costbp.config.methods import (
    BackpropSpec,
    ExactOracle,
    LocalGuessSpec,
    MethodEntry,
    ProjectedSpec,
    PythonSpec,
)
from costbp.config.shares import RULE_OF_THUMB, Shares
from costbp.config.study import Cell, Plan
from costbp.train.record import UNFIT

SEEDS = 5  # that a comparison needs
LEARNT = 0.05  # accuracy above the start and the majority class from which a method has learnt
SAME_ACCURACY = 0.0051  # of an evaluation, up to which two trajectories are one; an example of 240
SAME_LOSS = 2e-3  # the same, relative
CURVE = ("step", "forward_units", "flops", "seconds", "validation_accuracy", "validation_loss")
# fmt: off
Kind = Literal["missing", "untuned", "seeds", "failed", "unfit", "diverged", "unlearnt", "memory",
               "same", "plain", "reach"]
# fmt: on
BLOCKED = ("missing", "untuned", "seeds", "failed")  # kinds that more runs would mend


class LeftOut(NamedTuple):
    """What is not compared, and why."""

    name: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Arm:
    """One method's runs on a model, task and budget.

    Attributes:
        runs: seed -> row of ``frames.runs``.
        curves: seed -> evaluations x ``CURVE``, in order of steps.
        seeds: those that completed.
        depth: sequential forwards of a step, if known.
    """

    cell: Cell
    label: str
    planned: tuple[int, ...]
    runs: dict[int, dict[str, Any]]
    curves: dict[int, np.ndarray]
    depth: float | None

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        done = (s for s, run in self.runs.items() if run["outcome"] == "completed")
        return tuple(s for s in done if not pd.isna(self.runs[s]["test_accuracy"]))

    def column(self, name: str, seeds: tuple[int, ...] | None = None) -> np.ndarray:
        """A figure of each seed's run."""
        return np.array([self.runs[s][name] for s in seeds or self.seeds], dtype=float)

    @property
    def keeps_all(self) -> bool:
        """Whether under a ceiling its runs kept every block, as ``arrangement`` says."""
        found = {
            str(run.get("arrangement") or "").partition(" blocks kept")[0]
            for run in self.runs.values()
        }
        return bool(found) and all(len(set(text.split(" of "))) == 1 and text for text in found)

    def folders(self, seeds: tuple[int, ...]) -> list[str]:
        return [str(self.runs[s].get("folder", "")) for s in seeds if s in self.runs]

    @cached_property
    def mean_curve(self) -> np.ndarray:
        """Evaluations x ``CURVE``, mean over the seeds that completed."""
        count = min(len(self.curves[s]) for s in self.seeds)
        return np.mean([self.curves[s][:count] for s in self.seeds], axis=0)

    @property
    def gain(self) -> float:
        """Validation accuracy at its best above that at the start, of the mean curve."""
        accuracy = self.mean_curve[:, CURVE.index("validation_accuracy")]
        return float(accuracy.max() - accuracy[0])

    @property
    def learnt(self) -> bool:
        """Whether it rose above its start and the majority class, on average."""
        above = self.column("test_accuracy").mean() - self.runs[self.seeds[0]]["majority"]
        return bool(min(above, self.gain) >= LEARNT)

    @property
    def bytes(self) -> float:
        """At the peak of a step, weights included; under a ceiling, the ceiling."""
        run = self.runs[self.seeds[0]]
        own = run["peak_bytes"] + run["state_bytes"] + run["weights_bytes"]
        ceiling = run.get("ceiling_bytes")
        return float(own if ceiling is None or pd.isna(ceiling) or not ceiling else ceiling)

    def obstacle(self) -> Obstacle | None:
        """Why it can't be compared at all."""
        found = [run["outcome"] for run in self.runs.values()]
        if not found:
            return "missing", f"{self.label} has no runs"
        if unfit := [outcome for outcome in found if outcome in UNFIT]:
            return "unfit", f"{self.label}: {unfit[0].replace('_', ' ')}"
        if not all(run.get("tuned", False) for run in self.runs.values()):
            return "untuned", f"{self.label} is not tuned"
        if "diverged" in found:
            return (
                "diverged",
                f"{self.label} diverged in {found.count('diverged')} of {len(found)} seeds",
            )
        if len(self.seeds) < min(SEEDS, len(self.planned)):
            kind: Kind = "failed" if "failed" in found else "missing"
            return kind, f"{self.label} has {len(self.seeds)} of {len(self.planned)} runs ({kind})"
        return None


Obstacle = tuple[Kind, str]  # why nothing follows, as a kind and in words


def together(*arms: Arm) -> tuple[tuple[int, ...], Obstacle | None]:
    """Seeds that several arms completed, and why they can't be compared."""
    seeds = tuple(s for s in arms[0].seeds if all(s in arm.seeds for arm in arms))
    why = next((why for arm in arms if (why := arm.obstacle())), None)
    if why is None and len(seeds) < SEEDS:
        why = "seeds", f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, {SEEDS} are needed"
    return seeds, why


@dataclass(frozen=True)
class Pair:
    """Two methods on the same model, task and budget; the first is claimed to be the better.

    Attributes:
        name: of the comparison; methods whose trajectories are one are named together.
        reference: the study's reference there, if it ran.
        folders: of all its runs, of methods named together too.
    """

    name: str
    better: Arm
    worse: Arm
    reference: Arm | None
    folders: list[str]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Those that both completed."""
        return together(self.better, self.worse)[0]

    def obstacle(self, claim: Compared) -> Obstacle | None:
        """Why nothing follows from comparing them."""
        if (own := together(self.better, self.worse)[1]) is not None:
            return own
        others = [arm for arm in (self.better, self.worse) if arm is not self.reference]
        if not any(arm.learnt for arm in others):
            names = " and ".join(arm.label for arm in others)
            return "unlearnt", (
                f"{names} learnt nothing: not {100 * LEARNT:g} points above both the start and the "
                "majority class"
            )
        if isinstance(claim, ScoreClaim) and claim.memory is not None:
            ratio = self.better.bytes / self.worse.bytes
            if max(ratio, 1 / ratio) > claim.memory:
                return "memory", f"peaks differ by {max(ratio, 1 / ratio):.2f}x, weights included"
        return None


@dataclass(frozen=True)
class Evidence:
    """All that claims are held against.

    Attributes:
        traces: file name of ``config/claims.py`` -> cost table of one model.
    """

    plan: Plan
    frames: Frames
    traces: dict[str, pd.DataFrame] = field(default_factory=dict)

    @cached_property
    def reference(self) -> str:
        return self.plan.reference

    @cached_property
    def arms(self) -> dict[Cell, Arm]:
        """Every experiment of the study, with or without runs."""
        runs: dict[Cell, dict[int, dict[str, Any]]] = {}
        for run in self.frames.runs.to_dict("records"):
            runs.setdefault(Cell(*(run[name] for name in CELL)), {})[int(run["seed"])] = run
        curves: dict[Cell, dict[int, np.ndarray]] = {}
        if len(self.frames.curves):
            ordered = self.frames.curves.sort_values("step", kind="stable")
            values = ordered[list(CURVE)].to_numpy(float)
            keys = [*CELL, "seed"]
            for names, places in ordered.groupby(keys, sort=False).indices.items():
                curves.setdefault(Cell(*names[:4]), {})[int(names[4])] = values[places]
        entries = self.plan.catalog.methods
        return {
            cell: Arm(
                cell,
                entries[cell.method].label,
                self.plan.seeds(cell),
                runs.get(cell, {}),
                curves.get(cell, {}),
                depth(entries[cell.method]),
            )
            for cell in self.plan.cells()
        }

    @cached_property
    def groups(self) -> dict[tuple[str, str, str], dict[str, Arm]]:
        """(model, task, budget) -> method -> arm."""
        found: dict[tuple[str, str, str], dict[str, Arm]] = {}
        for cell, arm in self.arms.items():
            found.setdefault((cell.model, cell.task, cell.budget), {})[cell.method] = arm
        return found

    def others(self, methods: Iterable[str], claim: Any) -> list[str]:
        """Methods of the claim's families, the reference not among them."""
        wanted = getattr(claim, "methods", None)
        family = {name: entry.family for name, entry in self.plan.catalog.methods.items()}
        return [
            name
            for name in methods
            if name != self.reference
            and family[name] in claim.families
            and (wanted is None or name in wanted)
        ]

    def asked(self, methods: Collection[str], claim: Compared) -> list[tuple[str, str]]:
        """The claim's comparisons among some methods: the better and the worse."""
        if claim.baselines:
            return [names for names in claim.baselines.items() if set(names) <= set(methods)]
        others = self.others(methods, claim) if self.reference in methods else []
        if claim.favours == "other":
            return [(name, self.reference) for name in others]
        return [(self.reference, name) for name in others]

    def pairs(self, claim: Compared) -> Iterator[Pair | LeftOut]:
        """Every comparison that a claim asks for, each distinct pair of trajectories once."""
        for (model, task, budget), arms in self.groups.items():
            if model not in (claim.models or (model,)) or task not in (claim.tasks or (task,)):
                continue
            twin = self.twins[model, task, budget]
            votes: dict[tuple[str, str], list[tuple[str, str]]] = {}
            for names in self.asked(arms, claim):
                votes.setdefault((twin[names[0]], twin[names[1]]), []).append(names)
            place = f"{model}/{task}/{budget}"
            for (first, second), several in votes.items():
                better, worse = (
                    " = ".join(dict.fromkeys(arms[names[side]].label for names in several))
                    for side in (0, 1)
                )
                name = f"{better} against {worse}, {place}"
                if first == second:
                    yield LeftOut(name, "same", "both are the same trajectory")
                    continue
                methods = dict.fromkeys(method for names in several for method in names)
                folders = [f for m in methods for f in arms[m].folders(tuple(arms[m].runs))]
                one, two = several[0]
                reference = arms.get(self.reference)
                yield Pair(name, arms[one], arms[two], reference, folders)

    @cached_property
    def twins(self) -> dict[tuple[str, str, str], dict[str, str]]:
        """Per group: method -> the first method of the same trajectory."""
        found = {}
        for group, arms in self.groups.items():
            first: dict[str, str] = {}
            for name, arm in arms.items():
                same = (kept for kept in dict.fromkeys(first.values()) if _same(arms[kept], arm))
                first[name] = next(same, name)
            found[group] = first
        return found

    @cached_property
    def plain(self) -> set[tuple[str, str]]:
        """(model, task) where the reference recomputes nothing: it is plain BP there."""
        methods, found = self.plan.catalog.methods, set()
        stored = {
            name
            for name, entry in methods.items()
            if isinstance(entry.estimator, BackpropSpec)
            and entry.estimator.plan == "none"
            and entry.accumulate == 1
        }
        flops: dict[tuple[str, str], dict[str, float]] = {}
        if len(self.frames.costs):
            columns = self.frames.costs[["model", "task", "method", "flops"]]
            for model, task, method, count in columns.itertuples(index=False):
                flops.setdefault((model, task), {})[method] = count
        for model, task in self.plan.pairs():
            counts = flops.get((model, task), {})
            own = counts.get(self.reference)
            least = min((counts[name] for name in stored if name in counts), default=None)
            if self.plan.catalog.models[model].reads == "features" or (
                own is not None and least is not None and own <= 1.001 * least
            ):
                found.add((model, task))
        return found


def depth(method: MethodEntry, shares: Shares = RULE_OF_THUMB) -> float | None:
    """Sequential depth of an optimiser step, in forwards: what is left when all that doesn't wait for
    another runs side by side, which is directions, sides of a difference, micro-batches, and SVRG's two
    estimates. None where an estimator of the user's own states nothing.

    Backpropagation waits for itself; forward mode is a primal with its tangents; differences are one
    forward; a calibration's probes come before its step's derivatives.
    """
    spec, own = method.estimator, 1.0
    if isinstance(spec, BackpropSpec | PythonSpec):
        return spec.closed_form(shares)
    if isinstance(spec, LocalGuessSpec):
        own = 1.0 + shares.backward + 1.0 + shares.live
    elif isinstance(spec, ProjectedSpec) and isinstance(spec.oracle, ExactOracle):
        own = 1.0 + shares.live
    every = getattr(getattr(spec, "directions", None), "every", None)
    return own * (1 + (1 / every if every else 0.0))


def _same(one: Arm, two: Arm) -> bool:
    """Whether two methods' evaluations are equal within float noise, in every seed of both."""
    seeds = set(one.curves) & set(two.curves)
    return bool(seeds) and all(_equal(one.curves[seed], two.curves[seed]) for seed in seeds)


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    if one.shape != two.shape or not np.array_equal(one[:, 0], two[:, 0]):
        return False
    accuracy, loss = (CURVE.index(f"validation_{name}") for name in ("accuracy", "loss"))
    close = np.abs(one[:, accuracy] - two[:, accuracy]) <= SAME_ACCURACY
    return bool(
        close.all() and np.allclose(one[:, loss], two[:, loss], rtol=SAME_LOSS, equal_nan=True)
    )
