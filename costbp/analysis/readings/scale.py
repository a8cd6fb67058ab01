"""Readings along series of models in which one thing varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from costbp.analysis.arms import SEEDS, Evidence, Kind, LeftOut, Pair
from costbp.analysis.finding import Finding, Row
from costbp.analysis.readings.compare import Measured, sides
from costbp.analysis.statistics import Sample
from costbp.config.claims import Compared, ScaleClaim

Point = Callable[[Pair, tuple[int, ...]], np.ndarray | tuple[Kind, str]]
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
            good = []
            for name in here:
                if why := pairs[name].obstacle(claim):
                    finding.left_out.append(LeftOut(pairs[name].name, *why))
                else:
                    good.append(pairs[name])
            seeds = (
                tuple(s for s in good[0].seeds if all(s in p.seeds for p in good)) if good else ()
            )
            if len(good) < 2 or len(seeds) < SEEDS:
                continue
            found = [point(pair, seeds) for pair in good]
            if wrong := [(p, f) for p, f in zip(good, found, strict=True) if isinstance(f, tuple)]:
                finding.left_out += [LeftOut(pair.name, *why) for pair, why in wrong]
                continue
            size = np.log([pair.better.column(SIZE[varied])[0] for pair in good])
            slopes = np.polyfit(size, np.array(found), 1)[0]
            result = measured(slopes)
            ends = [100 * float(np.mean(values)) for values in np.array(found)[[0, -1]]]
            models_text = f"{good[0].better.cell.model} to {good[-1].better.cell.model}"
            labels = f"{good[0].better.label} against {good[0].worse.label}"
            cell = {"model": models_text, "task": task, "method": better, "budget": budget}
            finding.rows.append(
                Row(
                    f"{labels}, {models_text}, {task}/{budget}",
                    {**cell, "against": worse},
                    result.sample,
                    result.text.format(*ends),
                    [folder for pair in good for folder in pair.folders],
                    shift=result.shift,
                )
            )
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
