"""The readings of claims: what the runs say, comparison by comparison.

Each compares the study's reference with one FmAD or ZO method on one (model, task, budget), or one
method with another of its family, and files it: for the claim, against it, or undecided where seeds
overlap or a method learnt nothing that could be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from costbp.analysis.finding import Finding
from costbp.analysis.frames import CELL, Frames, at_units, first_reach
from costbp.config.claims import Claim, MemoryClaim, VariantClaim
from costbp.config.study import Plan
from costbp.train.record import UNFIT

CHANGED = 2  # points by which a gap must differ to count
LEARNT = 0.05  # accuracy above the majority class from which a run counts as having learnt


@dataclass(frozen=True)
class Pair:
    """Runs of the reference and of one other method on the same model, task and budget."""

    name: str
    reference: pd.DataFrame
    other: pd.DataFrame
    curves: pd.DataFrame

    def curve(self, run: Any) -> pd.DataFrame:
        """A run's evaluations."""
        mask = self.curves["seed"] == run.seed
        for column in CELL:
            mask &= self.curves[column] == getattr(run, column)
        return self.curves[mask]

    def seeds(self) -> Iterator[tuple[Any, Any]]:
        """Runs of both methods with the same seed."""
        others = {run.seed: run for run in self.other.itertuples()}
        for run in self.reference.itertuples():
            if run.seed in others:
                yield run, others[run.seed]


def pairs(plan: Plan, frames: Frames) -> Iterator[Pair]:
    """Every comparison of the reference with an FmAD or ZO method."""
    for (model, task, budget), group in _compared(frames):
        base = group[group["method"] == plan.reference]
        for method, other in group[group["family"] != "bp"].groupby("method", sort=False):
            if len(base):
                yield Pair(f"{method} on {model}/{task}/{budget}", base, other, frames.curves)


def _compared(frames: Frames) -> Any:
    """Runs of each model, task and budget that had room on their device: the others have no score,
    not a bad one."""
    runs = frames.runs[~frames.runs["outcome"].isin(UNFIT)]
    return runs.groupby(["model", "task", "budget"], sort=False)


def accuracy_gap(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    finding = Finding(
        f"Test accuracy at the end of an equal budget, {_reference(plan)} minus other method, mean "
        "over seeds. Decided where no seed of one reaches any seed of the other, and every seed of "
        f"one has left the majority class by {100 * LEARNT:g} points."
    )
    gaps = []
    for pair in pairs(plan, frames):
        ours, theirs = (f["test_accuracy"].fillna(0) for f in (pair.reference, pair.other))
        gap = ours.mean() - theirs.mean()
        gaps.append((gap, ours.mean() / max(theirs.mean(), 1e-9) - 1, pair.name))
        learnt = max(ours.min(), theirs.min()) >= pair.reference["majority"].max() + LEARNT
        words = "" if learnt else ", neither left the majority class in all its seeds"
        finding.sort(
            f"{pair.name}: {100 * gap:+.1f} points{words}", _apart(ours, theirs) if learnt else None
        )
    if gaps:
        gap, relative, name = max(gaps)
        finding.value = 100 * gap
        finding.measured = (
            f"{100 * min(gaps)[0]:+.1f} to {100 * gap:+.1f} points "
            f"(largest: {100 * relative:+.0f} % relative, {name})"
        )
    return finding


def _reference(plan: Plan) -> str:
    return plan.catalog.methods[plan.reference].label


def _apart(ours: pd.Series, theirs: pd.Series) -> bool | None:
    """True if all of ours are higher than all of theirs, False if all are lower, else None."""
    if ours.min() > theirs.max():
        return True
    return False if ours.max() < theirs.min() else None


def _to_same_accuracy(
    plan: Plan, frames: Frames, column: str, what: str
) -> tuple[Finding, list[float]]:
    """Ratios other/reference of ``column`` at the accuracy that the other method ends with.

    Seeds are paired. Runs that ended within 5 points of the majority class, or at the accuracy
    they started from, learnt nothing that a time could be measured to: undecided.
    """
    finding = Finding(
        f"{what} to the validation accuracy that the other method ends its budget with, other over "
        f"{_reference(plan)} (first crossing, linear between evaluations, seeds paired)."
    )
    ratios = []
    for pair in pairs(plan, frames):
        found = []
        for ours, theirs in pair.seeds():
            curve = pair.curve(theirs)
            target = float(curve.sort_values("step")["validation_accuracy"].iloc[-1])
            spent = first_reach(curve, target, column)
            needed = first_reach(pair.curve(ours), target, column)
            if target < theirs.majority + LEARNT or not spent:
                continue
            found.append(spent / needed if needed else (math.inf if needed == 0 else 0.0))
        if len(found) < len(pair.other):
            finding.sort(f"{pair.name}: not every seed left the majority class and its start", None)
            continue
        finite = [ratio for ratio in found if ratio != math.inf]
        ratio = statistics.geometric_mean(finite) if finite and min(finite) > 0 else min(found)
        words = {0.0: "reference never got there", math.inf: "reference starts there"}
        verdict = None if min(found) <= 1 <= max(found) else min(found) > 1
        finding.sort(f"{pair.name}: {words.get(ratio, f'{ratio:.1f}x')}", verdict)
        if ratio not in words:
            ratios.append(ratio)
    return finding, ratios


def time_to_same_accuracy(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    finding, ratios = _to_same_accuracy(plan, frames, "seconds", "Training seconds")
    if ratios:
        low, high = (100 * (1 - 1 / ratio) for ratio in (min(ratios), max(ratios)))
        finding.value = high
        finding.measured = (
            f"{min(ratios):.1f}x to {max(ratios):.1f}x, so {low:.1f} to {high:.1f} % less time"
        )
    return finding


def flops_to_same_accuracy(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    finding, ratios = _to_same_accuracy(plan, frames, "flops", "FLOPs")
    if ratios:
        finding.value = max(ratios)
        finding.measured = f"{min(ratios):.1f}x to {max(ratios):.1f}x"
    return finding


def _compare_costs(
    plan: Plan,
    frames: Frames,
    definition: str,
    ratio: Callable[[Any, Any], float],
    supports: Callable[[float], bool],
    words: str = "{}",
    families: tuple[str, ...] = ("fmad", "zo"),
) -> Finding:
    """File ``ratio(reference, other)`` of the cost table's rows for every method of ``families``,
    on models that run more than a head."""
    heads = dict.fromkeys(frames.costs.loc[frames.costs["seq"] == 0, "model"])
    left_out = f" Without {', '.join(heads)}, of which only the head runs." if heads else ""
    finding, found = Finding(definition + left_out), []
    for (model, task), group in frames.costs[frames.costs["seq"] > 0].groupby(
        ["model", "task"], sort=False
    ):
        rows = {str(row.method): row for row in group.itertuples()}
        for method, row in rows.items():
            if plan.catalog.methods[method].family in families and plan.reference in rows:
                found.append(ratio(rows[plan.reference], row))
                name = f"{method} on {model}/{task}: {found[-1]:.2f}x"
                finding.sort(name, supports(found[-1]))
    if found:
        finding.value = max(found)
        finding.measured = words.format(f"{min(found):.2f}x to {max(found):.2f}x")
    return finding


def _memory_ratio(ours: Any, theirs: Any) -> float:
    first, second = (int(row.peak_bytes + row.state_bytes) for row in (ours, theirs))
    return first / second


def flops_per_step(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    return _compare_costs(
        plan,
        frames,
        f"Counted FLOPs of one optimiser step, other over {_reference(plan)}.",
        lambda ours, theirs: theirs.flops / ours.flops,
        lambda x: x > 1,
    )


def memory_comparable(plan: Plan, frames: Frames, claim: MemoryClaim) -> Finding:
    return _compare_costs(
        plan,
        frames,
        f"Peak bytes of one step beyond weights, {_reference(plan)} over other; comparable means at "
        f"most {claim.tolerance:g}x.",
        _memory_ratio,
        lambda x: x <= claim.tolerance,
        "{} of the other's",
    )


def zo_needs_least_memory(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    return _compare_costs(
        plan,
        frames,
        f"Peak bytes of one step beyond weights, {_reference(plan)} over ZO.",
        _memory_ratio,
        lambda x: x > 1,
        f"{_reference(plan)} needs {{}}",
        families=("zo",),
    )


def gap_grows_with_d(plan: Plan, frames: Frames, claim: Claim) -> Finding:
    finding = Finding(
        f"Validation accuracy of {_reference(plan)} minus the other's at the same number of forward "
        "units, the most that all runs compared have reached, on each task's models with the "
        "smallest and the largest trainable vector. Decided where the gap differs by more than "
        f"{CHANGED:g} points."
    )
    curves = dict(list(frames.curves.groupby(["model", "task", "method"], sort=False)))
    changes, spent = [], []
    compared: dict[tuple[str, str], None] = {}
    for task, runs in frames.runs.groupby("task", sort=False):
        sizes = runs.groupby("model")["d"].max().sort_values()
        small, large = sizes.index[0], sizes.index[-1]
        if sizes[small] == sizes[large]:
            continue
        for method in dict.fromkeys(runs["method"]):
            keys = [(m, task, k) for m in (small, large) for k in (plan.reference, method)]
            family = plan.catalog.methods[method].family
            if family == "bp" or any(key not in curves for key in keys):
                continue
            units = min(curves[key].groupby("seed")["forward_units"].max().min() for key in keys)
            scores = [at_units(curves[key], units)["accuracy"].mean() for key in keys]
            if any(map(math.isnan, scores)):
                continue
            few, many = (100 * (scores[i] - scores[i + 1]) for i in (0, 2))
            changes.append(many - few)
            spent.append(units)
            compared[small, large] = None
            verdict = None if abs(changes[-1]) <= CHANGED else changes[-1] > 0
            finding.sort(
                f"{method} on {task}: {few:.1f} -> {many:.1f} points at {units:.0f} units", verdict
            )
    if changes:
        finding.value = statistics.mean(changes)
        names = ", ".join(f"{small} -> {large}" for small, large in compared)
        finding.measured = (
            f"gap changes by {min(changes):+.1f} to {max(changes):+.1f} points at {min(spent):.0f} "
            f"to {max(spent):.0f} units ({names})"
        )
        finding.definition += "".join(f" {_varied(plan, *names)}" for names in compared)
    return finding


def _varied(plan: Plan, small: str, large: str) -> str:
    """What differs between two models: the trainable vector alone, or what it is laid on, too."""
    first, second = (plan.catalog.models[name] for name in (small, large))
    if first.source == second.source:
        return f"{small} and {large} share one base: d is varied, not the size of the model."
    return f"{small} and {large} have different bases: more than d is varied."


def beats_its_baseline(plan: Plan, frames: Frames, claim: VariantClaim) -> Finding:
    finding = Finding(
        "Test accuracy at the end of an equal budget, each method of the claim minus its baseline, "
        "mean over seeds. Decided where no seed of one reaches any seed of the other."
    )
    gaps = []
    for (model, task, budget), group in _compared(frames):
        scores = {m: g["test_accuracy"].fillna(0) for m, g in group.groupby("method")}
        for method, baseline in claim.baselines.items():
            if method in scores and baseline in scores:
                ours, theirs = scores[method], scores[baseline]
                gaps.append(100 * (ours.mean() - theirs.mean()))
                name = f"{method} against {baseline} on {model}/{task}/{budget}"
                finding.sort(f"{name}: {gaps[-1]:+.1f} points", _apart(ours, theirs))
    if gaps:
        finding.value = statistics.mean(gaps)
        finding.measured = f"{min(gaps):+.1f} to {max(gaps):+.1f} points"
    return finding


READINGS: Mapping[str, Callable[[Plan, Frames, Any], Finding]] = {
    function.__name__: function
    for function in (
        accuracy_gap,
        beats_its_baseline,
        time_to_same_accuracy,
        flops_to_same_accuracy,
        flops_per_step,
        gap_grows_with_d,
        memory_comparable,
        zo_needs_least_memory,
    )
}
