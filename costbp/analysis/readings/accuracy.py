"""Readings of final accuracy: who is ahead, what changes places, and whether anything is learnt."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from costbp.analysis.arms import CURVE, Evidence, LeftOut, Pair, together
from costbp.analysis.finding import Finding, Measured
from costbp.analysis.readings.compare import compare, sides
from costbp.analysis.statistics import Sample
from costbp.config.claims import LearnsClaim, RankingClaim, ScoreClaim, SpikeClaim

GAINED = 0.05  # accuracy above the start that counts as learning


def accuracy_gap(evidence: Evidence, claim: ScoreClaim) -> Finding:
    """Test accuracy at the end of an equal budget, in points; relative, too, for a claimed size."""
    better, worse = sides(evidence, claim)
    behind = f", allowed to be {claim.margin:g} points behind" if claim.margin else ""
    near = f"; peaks with weights within {claim.memory:g}x" if claim.memory else ""
    finding = Finding(
        f"Test accuracy at the end of an equal budget, {better} minus {worse}{behind}, paired over "
        f"seeds{near}. Diverged runs are counted under instability, not here.",
        f"{better} ended with a higher test accuracy than {worse}"
        + (f", or at most {claim.margin:g} points behind" if claim.margin else ""),
        "points",
    )

    def measure(pair: Pair) -> Measured:
        ours, theirs = (a.column("test_accuracy", pair.seeds) for a in (pair.better, pair.worse))
        gap = ours - theirs
        safe = np.log(np.maximum(ours, 1e-3) / np.maximum(theirs, 1e-3))
        text = f"{100 * gap.mean():+.1f} points ({100 * ours.mean():.1f} against {100 * theirs.mean():.1f})"
        margin = claim.margin / 100
        sizes = {False: [Sample(gap)], True: [Sample(safe)]}
        return Measured(Sample(gap + margin), text, sizes, -margin)

    return compare(evidence, claim, finding, measure)


def rankings(evidence: Evidence, claim: RankingClaim) -> Finding:
    """Pairs of methods on two models: for where the order is decided on both, and reversed."""
    first, second = claim.models
    finding = Finding(
        f"Order of two methods by test accuracy on {first} and on {second}; the less sure of the "
        "two leads counts, positive where the order flips.",
        f"{first} and {second} ranked methods differently",
        "points",
        takes=claim.takes or f"a study with models {first} and {second}",
    )
    tables = {group: arms for group, arms in evidence.groups.items() if group[0] == first}
    for (_, task, budget), ours in tables.items():
        theirs = evidence.groups.get((second, task, budget), {})
        shared = [name for name in evidence.others(ours, claim) if name in theirs]
        for one, two in combinations(shared, 2):
            found = [arms[name] for arms in (ours, theirs) for name in (one, two)]
            name = f"{found[0].label} and {found[1].label}, {task}/{budget}"
            seeds, why = together(*found)
            if why is not None:
                finding.left_out.append(LeftOut(name, *why))
                continue
            score = [arm.column("test_accuracy", seeds) for arm in found]
            orders = [Sample(score[0] - score[1]), Sample(score[2] - score[3])]
            weak = max(orders, key=lambda sample: sample.p)
            flips = orders[0].mean * orders[1].mean < 0
            sample = Sample(np.abs(weak.mean) * (1 if flips else -1) + weak.values - weak.mean)
            texts = [f"{100 * order.mean:+.1f} points" for order in orders]
            folders = [folder for arm in found for folder in arm.folders(seeds)]
            finding.add(Measured(sample, " and ".join(texts)), name, found[0].cell, two, folders)
    return finding


def learns(evidence: Evidence, claim: LearnsClaim) -> Finding:
    """Validation accuracy at the end above that at the start."""
    finding = Finding(
        f"Validation accuracy at the end minus that at the start, beyond {100 * GAINED:g} points.",
        f"methods rose more than {100 * GAINED:g} points above their start",
        "points",
        takes=claim.takes or f"a study with task {' or '.join(claim.tasks)}",
    )
    accuracy = CURVE.index("validation_accuracy")
    for (model, task, budget), arms in evidence.groups.items():
        for method in evidence.others(arms, claim) if task in claim.tasks else ():
            arm = arms[method]
            name, (seeds, why) = f"{arm.label}, {model}/{task}/{budget}", together(arm)
            if why is not None:
                finding.left_out.append(LeftOut(name, *why))
                continue
            gains = np.array([np.diff(arm.curves[s][[0, -1], accuracy])[0] for s in seeds])
            found = Measured(
                Sample(gains - GAINED), f"{100 * gains.mean():+.1f} points", {}, GAINED
            )
            finding.add(found, name, arm.cell, "", arm.folders(seeds))
    return finding


def spikes(evidence: Evidence, claim: SpikeClaim) -> Finding:
    """Steps whose directional derivative is beyond ten times its running median."""
    better, worse = sides(evidence, claim)
    finding = Finding(
        f"Spikes a thousand steps (a step's directional derivatives, or {better}'s gradient norm, beyond "
        f"ten times the running median of a hundred steps), {worse} minus {better}, paired over seeds.",
        f"{worse} spiked more often than {better}",
        "spikes",
    )

    def measure(pair: Pair) -> Measured:
        per = [
            1000 * a.column("spikes", pair.seeds) / a.column("steps", pair.seeds)
            for a in (pair.better, pair.worse)
        ]
        after = pair.worse.column("spike_loss", pair.seeds)
        known = after[~np.isnan(after)]
        text = f"{per[1].mean():.2f} against {per[0].mean():.2f} spikes a thousand steps"
        if len(known):
            text += f", loss in the ten steps after {100 * np.expm1(known.mean()):+.0f} %"
        return Measured(Sample(per[1] - per[0]), text)

    found = compare(evidence, claim, finding, measure)
    if ended := [part for part in found.left_out if part.kind == "diverged"]:
        found.definition += f" Diverged, and so not paired: {len(ended)} of these comparisons."
    return found
