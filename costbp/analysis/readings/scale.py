"""Readings along series of models in which one thing varies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from costbp.analysis.arms import Evidence, LeftOut, Obstacle, Pair, together
from costbp.analysis.finding import Finding, Measured
from costbp.analysis.readings.compare import sides
from costbp.analysis.statistics import Sample
from costbp.config.claims import Compared, ScaleClaim
from costbp.config.study import Cell

Point = Callable[[Pair, tuple[int, ...]], np.ndarray | Obstacle]
SIZE = {"d": "d", "size": "weights_bytes"}  # what varies -> column of runs


def along(
    evidence: Evidence,
    claim: Compared,
    finding: Finding,
    series: Sequence[tuple[str, ...]],
    varied: str,
    point: Point,
    measured: Callable[[np.ndarray], Measured],
) -> Finding:
    """``finding`` with a row for each method, task and budget of each series: ``measured`` of the slopes,
    seed by seed, of ``point`` against the natural logarithm of what varies. A model on which a method
    can't be compared is left out, with the reason."""
    wanted = [name for names in series for name in names]
    finding.takes = claim.takes or f"a study with {' and '.join(map(', '.join, series))}"
    lines: dict[tuple[str, ...], dict[str, Pair]] = {}
    for pair in evidence.pairs(claim.model_copy(update={"models": tuple(wanted)})):
        if isinstance(pair, LeftOut):
            finding.left_out.append(pair)
            continue
        names = pair.better.cell, pair.worse.cell.method
        key = (names[0].task, names[0].budget, names[0].method, names[1])
        lines.setdefault(key, {})[pair.better.cell.model] = pair
    for (task, budget, better, worse), pairs in lines.items():
        for models in series:
            here = [name for name in models if name in pairs]
            if len(here) < 2:
                continue
            whys = {name: pairs[name].obstacle(claim) for name in here}
            finding.left_out += [LeftOut(pairs[n].name, *why) for n, why in whys.items() if why]
            good = [pairs[name] for name in here if whys[name] is None]
            if len(good) < 2:
                continue
            seeds, why = together(*(arm for pair in good for arm in (pair.better, pair.worse)))
            if why is not None:
                finding.left_out.append(LeftOut(f"{good[0].name} and larger", *why))
                continue
            found = [point(pair, seeds) for pair in good]
            if wrong := [(p, f) for p, f in zip(good, found, strict=True) if isinstance(f, tuple)]:
                finding.left_out += [LeftOut(pair.name, *why) for pair, why in wrong]
                continue
            size = np.log([pair.better.column(SIZE[varied])[0] for pair in good])
            slopes = np.polyfit(size, np.array(found), 1)[0]
            result = measured(slopes)
            ends = [100 * float(np.mean(values)) for values in np.array(found)[[0, -1]]]
            cell = Cell(" to ".join(p.better.cell.model for p in good), task, better, budget)
            labels = f"{good[0].better.label} against {good[0].worse.label}"
            name = f"{labels}, {cell.model}/{task}/{budget}"
            result = dataclasses.replace(result, text=result.text.format(*ends))
            folders = [folder for pair in good for folder in pair.folders]
            finding.add(result, name, cell, worse, folders)
    return finding


def gap_over_scale(evidence: Evidence, claim: ScaleClaim) -> Finding:
    """How the lead in test accuracy changes as one thing grows tenfold."""
    better, worse = sides(evidence, claim)
    what = {"d": "trained parameters of one base", "size": "bytes of the base"}[claim.varied]
    finding = Finding(
        f"Slope of the lead in test accuracy, {better} minus {worse}, against the logarithm of "
        f"{what}, at one task and budget, paired over seeds.",
        f"{better}'s lead over {worse} grew with {what}",
        "points per tenfold",
    )

    def point(pair: Pair, seeds: tuple[int, ...]) -> np.ndarray:
        ours, theirs = (a.column("test_accuracy", seeds) for a in (pair.better, pair.worse))
        return np.asarray(ours - theirs)

    def measured(slopes: np.ndarray) -> Measured:
        tenfold = slopes * np.log(10)
        text = f"{100 * tenfold.mean():+.1f} points per tenfold ({{:+.1f}} to {{:+.1f}} points)"
        return Measured(Sample(tenfold), text)

    return along(evidence, claim, finding, claim.series, claim.varied, point, measured)
