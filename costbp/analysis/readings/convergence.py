"""Readings of what it takes to get somewhere: fixed targets, first crossings, bounds.

Targets are shares of the reference's gain over its start, on the validation split, by its mean curve. A
run that never gets there within its budget is a bound, not a missing value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from costbp.analysis.arms import CURVE, LEARNT, Arm, Evidence, Obstacle, Pair
from costbp.analysis.finding import Finding, Measured
from costbp.analysis.frames import Frames
from costbp.analysis.readings.compare import compare, sides
from costbp.analysis.statistics import ALPHA, Sample
from costbp.config.claims import TargetClaim
from costbp.config.study import Plan

NAMES = {
    "forward_units": "forward units",
    "flops": "FLOPs",
    "seconds": "training seconds",
    "depth": "sequential forwards, perturbations and micro-batches side by side,",
}


class Crossing(NamedTuple):
    """Where a curve first reaches a target.

    Attributes:
        late: it never does: ``value`` is where it ends.
        early: it does before the first evaluation after the start: ``value`` is that evaluation's.
    """

    value: float
    late: bool = False
    early: bool = False


def crossing(x: np.ndarray, y: np.ndarray, target: float) -> Crossing:
    """First crossing of ``target``; between evaluations linear in x, or in its logarithm where
    evaluations are spaced by it.

    Args:
        x: what has been spent at each evaluation, rising from 0.
        y: accuracy there.
    """
    above = np.flatnonzero(y >= target)
    if not len(above):
        return Crossing(float(x[-1]), late=True)
    place = int(above[0])
    if place <= 1:
        return Crossing(float(x[min(1, len(x) - 1)]), early=True)
    share = (target - y[place - 1]) / (y[place] - y[place - 1])
    low, high = x[place - 1], x[place]
    if low > 0 and _by_logarithm(x):
        return Crossing(float(low * (high / low) ** share))
    return Crossing(float(low + share * (high - low)))


def _by_logarithm(x: np.ndarray) -> bool:
    middle = x[len(x) // 2]
    return bool(x[-1] - middle > 2 * (middle - x[0]))


def target_of(reference: Arm, share: float) -> float:
    """Validation accuracy at a share of the reference's gain."""
    accuracy = reference.mean_curve[:, CURVE.index("validation_accuracy")]
    return float(accuracy[0] + share * (accuracy.max() - accuracy[0]))


def reach(arm: Arm, seed: int, measure: str, target: float) -> Crossing:
    """What a run spends, in ``measure``, until it reaches ``target``."""
    curve = arm.curves[seed]
    if measure == "depth":
        spent = curve[:, 0] * (arm.depth or math.nan)
    else:
        spent = curve[:, CURVE.index(measure)]
    return crossing(spent, curve[:, CURVE.index("validation_accuracy")], target)


def ratio(pair: Pair, measure: str, share: float) -> Sample | None:
    """Logarithm of what the worse spends over what the better does, seed by seed; None where a seed
    says nothing, since both runs are bounds of the same kind."""
    assert pair.reference is not None
    target = target_of(pair.reference, share)
    values, at_least, at_most = [], False, False
    for seed in pair.seeds:
        ours, theirs = (reach(arm, seed, measure, target) for arm in (pair.better, pair.worse))
        up, down = theirs.late or ours.early, theirs.early or ours.late
        if up and down:
            return None
        at_least, at_most = at_least or up, at_most or down
        values.append(math.log(theirs.value / ours.value))
    return Sample(np.array(values), at_least=at_least, at_most=at_most)


def _ready(pair: Pair, claim: TargetClaim, evidence: Evidence) -> Obstacle | None:
    """Why no target can be set, or what it takes to it not be compared."""
    if pair.reference is None or pair.reference.obstacle():
        return "missing", "targets are the reference's, which has no tuned and complete runs here"
    if pair.reference.gain < LEARNT:
        return (
            "unlearnt",
            f"{pair.reference.label} gained {100 * pair.reference.gain:.1f} points only",
        )
    if claim.measure == "depth" and None in (pair.better.depth, pair.worse.depth):
        return "plain", "a method's sequential depth is not known"
    cell = pair.better.cell
    stored = pair.reference.keeps_all or (cell.model, cell.task) in evidence.plain
    if claim.measure == "seconds" and stored:
        return "plain", f"{pair.reference.label} recomputes nothing there: it is plain BP"
    return None


def to_target(evidence: Evidence, claim: TargetClaim) -> Finding:
    """What each needs to reach shares of the reference's gain, as a ratio; one vote a comparison, of the
    mean over targets; for a claimed size the largest of all targets."""
    better, worse = sides(evidence, claim)
    shares = ", ".join(f"{100 * share:g}" for share in claim.targets)
    what = NAMES[claim.measure]
    finding = Finding(
        f"{what[0].upper()}{what[1:]} to {shares} % of the reference's gain over its start on the "
        f"validation split (its mean curve), {worse} over {better}: first crossing, paired over seeds; "
        "runs that never get there are bounds.",
        f"{better} needed fewer {what.rstrip(',')} than {worse} to the same accuracy",
        "x",
    )

    def measure(pair: Pair) -> Measured | Obstacle:
        if why := _ready(pair, claim, evidence):
            return why
        found = {s: v for s in claim.targets if (v := ratio(pair, claim.measure, s)) is not None}
        if not found:
            least = f"{100 * min(claim.targets):g} %"
            return (
                "reach",
                f"in some seed neither reached {least}, or both before evaluations begin",
            )
        parts = list(found.values())
        sample = Sample(
            np.mean([part.values for part in parts], axis=0),
            at_least=any(part.at_least for part in parts),
            at_most=any(part.at_most for part in parts),
        )
        text = ", ".join(f"{_bounded(v)} at {100 * share:g} %" for share, v in found.items())
        return Measured(sample, text, {True: parts})

    return compare(evidence, claim, finding, measure)


def _bounded(sample: Sample) -> str:
    sign = {(True, False): ">= ", (False, True): "<= ", (True, True): "about "}
    return sign.get((sample.at_least, sample.at_most), "") + f"{math.exp(sample.mean):.3g}x"


def slowdown_over_d(evidence: Evidence, claim: TargetClaim) -> Finding:
    """Exponent with which the slow-down grows with d: 1 if it is the dimension's, 0 if an effective
    rank's. For the claim where it is nearer to 0."""
    from costbp.analysis.readings.scale import along

    better, worse = sides(evidence, claim)
    finding = Finding(
        f"Exponent of d in {NAMES[claim.measure]} to {100 * claim.targets[0]:g} % of the reference's gain, "
        f"{worse} over {better}, along models that differ in d alone; for where it is nearer to 0 than to "
        "1, paired over seeds.",
        f"the slow-down of {worse} grew slower than the square root of d",
        "below 1",
    )

    def point(pair: Pair, seeds: tuple[int, ...]) -> np.ndarray | Obstacle:
        if why := _ready(pair, claim, evidence):
            return why
        found = ratio(pair, claim.measure, claim.targets[0])
        if found is not None and (found.p >= ALPHA or found.mean < 0):
            return "reach", "no slow-down that could grow"
        if found is None or found.at_least or found.at_most:
            return "reach", "a target was not reached, or before the first evaluation"
        return found.values[[pair.seeds.index(seed) for seed in seeds]]

    def measured(slopes: np.ndarray) -> Measured:
        return Measured(Sample(0.5 - slopes), f"exponent {slopes.mean():+.2f}", {}, 0.5)

    return along(evidence, claim, finding, claim.series, "d", point, measured)


def profiles(
    plan: Plan, frames: Frames, measure: str = "forward_units", share: float = 0.5
) -> pd.DataFrame:
    """Performance profiles (Dolan and More 2002): for each method the share of problems (model, task,
    budget, seed) that it brings to the target within ``factor`` times the least of all methods.

    Returns:
        Rows of ``method``, ``factor`` (1 and more) and ``solved`` (0 to 1), a step function; empty where
        no target can be set.
    """
    evidence, spent = Evidence(plan, frames), {}
    for group, arms in evidence.groups.items():
        reference = arms.get(plan.reference)
        if reference is None or not reference.seeds or reference.gain < LEARNT:
            continue
        target = target_of(reference, share)
        for name, arm in arms.items():
            for seed in reference.seeds:
                found = reach(arm, seed, measure, target) if seed in arm.seeds else None
                late = found is None or found.late
                spent[(*group, seed), name] = math.inf if late else found.value  # type: ignore[union-attr]
    if not spent:
        return pd.DataFrame(columns=["method", "factor", "solved"])
    table = pd.Series(spent).unstack()
    factors = table.div(table.min(axis=1), axis=0)
    rows = []
    for method in factors:
        known = factors[method].dropna()
        for count, factor in enumerate(sorted(f for f in known if math.isfinite(f)), start=1):
            rows.append({"method": method, "factor": factor, "solved": count / len(known)})
    return pd.DataFrame(rows, columns=["method", "factor", "solved"])
