"""Learning rates, and steps of differences, by successive halving (Jamieson and Talwalkar 2016).

Every method spends the same: in the first of ``total`` rounds 2^total settings get 1 / 2^total of the
budget each, in every further round the better half of them twice as much, from the start again. So a
round costs one budget. The first round begins with the rates that all methods share, and goes on round
its best: beyond an edge of the range, then along the steps of differences where a method has any, then
between rates. Of settings of one rate the best goes on. Where a round's best is the edge of what is
left, the next rate beyond takes the place of the last that would go on, in the last round only if it
was never tried: short trials favour other rates than long ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from costbp.config.load import own_choices
from costbp.config.methods import MethodEntry
from costbp.config.study import Cell, Plan
from costbp.config.tuning import Setting, Trial, Tuned, Tuning, searches_eps
from costbp.console import say
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.errors import UserError
from costbp.files import write_json, write_text
from costbp.train.experiment import run_specs
from costbp.train.record import Record

CLEARLY = 2.0  # standard errors above the majority class


def ranked(trials: Sequence[Trial], *, majority: float, examples: int) -> list[Trial]:
    """Trials of one round, the best first.

    While the best accuracy is at most two binomial standard errors above the ``majority`` class's,
    validation loss decides. Above that accuracy does, and loss among those within one standard error
    of the best; then so among the rest. What did not complete comes last, lower rates first.

    Args:
        majority: share of the most frequent class of the validation split.
        examples: its size.
    """

    def error(accuracy: float) -> float:
        return math.sqrt(accuracy * (1 - accuracy) / examples)

    def loss(trial: Trial) -> float:
        return math.inf if trial.loss is None else trial.loss

    left = [t for t in trials if t.outcome == "completed" and t.accuracy is not None]
    lost = sorted((t for t in trials if t not in left), key=lambda trial: trial.lr)
    order: list[Trial] = []
    while left:
        top = max(trial.accuracy or 0.0 for trial in left)
        chance = top <= majority + CLEARLY * error(majority)
        least = 0.0 if chance else top - error(top)
        order += sorted((t for t in left if (t.accuracy or 0.0) >= least), key=loss)
        left = [t for t in left if t not in order]
    return order + lost


@dataclass
class Search:
    """What an experiment's trials try, one after another.

    Attributes:
        rank: sorts the trials of a round, the best first.
        trials: those told of.
        notes: how the range was extended.
    """

    tuning: Tuning
    method: MethodEntry
    rank: Callable[[Sequence[Trial]], list[Trial]]
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def asks(self) -> Iterator[tuple[Setting, float]]:
        """Settings, and their share of the budget. The trial of each is to be appended to ``trials``
        before the next is asked for."""
        count = 2**self.tuning.total
        steps = iter(self.tuning.eps if searches_eps(self.method) else ())
        roots = self.tuning.roots(self.method)
        yield from ((root, 1 / count) for root in roots)
        for _ in range(count - len(roots)):
            order = self.round(1 / count)
            beyond, eps = self._beyond(order[0]), None
            if beyond is None and (eps := next(steps, None)) is not None:
                beyond = order[0].but(eps=eps)
            yield beyond or self._between(order[: len(order) // 2]), 1 / count
        while count > 2:
            order = self.round(1 / count)
            firsts: dict[tuple[str, float], Trial] = {}
            for trial in order:
                firsts.setdefault((trial.name, trial.lr), trial)
            left = [*firsts.values(), *(t for t in order if t not in firsts.values())][: count // 2]
            beyond, count = self._beyond(left[0], readmit=count > 4), count // 2
            kept = left if beyond is None else left[:-1]
            yield from ((trial.but(), 1 / count) for trial in kept)
            if beyond is not None:
                yield beyond, 1 / count

    def round(self, share: float) -> list[Trial]:
        """The trials at a share of the budget, the best first."""
        return self.rank([trial for trial in self.trials if trial.share == share])

    def _rates(self, name: str) -> list[float]:
        return sorted({trial.lr for trial in self.trials if trial.name == name})

    def _beyond(self, best: Trial, *, readmit: bool = True) -> Setting | None:
        """Where the best rate of a round is the edge of the round's: the next that has been tried
        beyond, half a decade off (with ``readmit``), or a decade beyond the range, if that may grow."""
        rates = self._rates(best.name)
        inside = sorted(t.lr for t in self.trials if (t.share, t.name) == (best.share, best.name))
        if best.lr not in (inside[0], inside[-1]):
            return None
        down = best.lr == inside[0]
        off = [rate for rate in rates if (best.lr / rate if down else rate / best.lr) > 3]
        if off:
            return best.but(lr=off[-1] if down else off[0]) if readmit else None
        if len(self.notes) == self.tuning.beyond:
            return None
        lr = _rounded(rates[0] / 10 if down else rates[-1] * 10)
        self.notes.append(f"range extended to {best.name} {lr:g}")
        return best.but(lr=lr)

    def _between(self, leaders: Sequence[Trial]) -> Setting:
        """A rate halfway, in the logarithm, from a leader to its neighbour: first where rates are a
        decade apart, then where they are half as far."""
        for gap in (0.7 / 2**level for level in itertools.count()):
            for trial in leaders:
                rates = self._rates(trial.name)
                place = rates.index(trial.lr)
                for other in (*rates[place + 1 : place + 2], *rates[max(place - 1, 0) : place]):
                    if abs(math.log10(other / trial.lr)) > gap:
                        return trial.but(lr=_rounded(math.sqrt(other * trial.lr)))
        raise AssertionError

    def tuned(self, key: str) -> Tuned:
        """The choice by the last round."""
        best = self.round(1 / 2)[0]
        if best.outcome != "completed":
            return Tuned(key=key, note="no trial completed", trials=tuple(self.trials))
        rates = self._rates(best.name)
        notes = list(self.notes)
        if best.lr in (rates[0], rates[-1]):
            notes.append(f"the choice stands at the edge of {rates[0]:g} to {rates[-1]:g}")
        return Tuned(key=key, choice=best.but(), note="; ".join(notes), trials=tuple(self.trials))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def run_trials(plan: Plan, cell: Cell) -> Tuned:
    """Run an experiment's trials through the store, and choose; the test split is never scored.

    Raises:
        UserError: interrupted, or a trial failed; the same call continues.
    """
    facts = load_prepared(prepare(Pair.of(plan, *cell[:2]))).facts
    majority, examples = (facts[name]["validation"] for name in ("majority", "examples"))
    rank = partial(ranked, majority=majority, examples=examples)
    search = Search(plan.study.tuning, plan.catalog.methods[cell.method], rank)
    asked: list[tuple[Setting, float]] = []

    def specs() -> Iterator[Any]:
        for setting, share in search.asks():
            asked.append((setting, share))
            yield plan.trial_spec(cell, setting, share)
            if search.trials[-1].outcome == "failed":
                return

    def told(record: Record) -> None:
        (setting, share), summary = asked[-1], record.summary
        accuracy, loss = summary.validation_accuracy, summary.validation_loss
        found = {
            "accuracy": None if accuracy is None else round(accuracy, 5),
            "loss": None if loss is None else float(f"{loss:.5g}"),
        }
        trial = Trial(**setting.model_dump(), share=share, outcome=record.outcome, **found)
        search.trials.append(trial)

    run_specs(plan, specs(), test=False, done=told)
    tuned = search.tuned(plan.tuning_key(cell))
    if tuned.note:
        say(f"{cell}: {tuned.note}")
    return tuned


def write_manifest(plan: Plan, cell: Cell, tuned: Tuned, path: Path | None) -> None:
    """What the workflow sees of an experiment's trials."""
    write_json(path or plan.trials_file(cell), tuned.compact())


def write_choices(plan: Plan, path: Path) -> None:
    """Write every experiment's choice, and all its trials, a line each.

    Raises:
        UserError: an experiment's trials have not been run under these settings.
    """
    found = plan.model_copy(update={"tuned": own_choices(plan)})
    choices: dict[str, Any] = {}
    for cell in plan.cells():
        tuned = found.tuned_at(cell)
        if tuned is None or tuned.key != plan.tuning_key(cell):
            raise UserError(f"{cell}: has not been tuned; run `snakemake tune`")
        methods = choices.setdefault(cell.model, {}).setdefault(cell.task, {})
        methods.setdefault(cell.method, {})[cell.budget] = tuned.compact()
    tuning = plan.study.tuning
    about = (
        f"Written by `snakemake tune` for study '{plan.name}': seed {tuning.seed}, {tuning.trials} "
        f"trials an experiment, together {tuning.total} of its budgets, on the validation split."
    )
    text = yaml.safe_dump(
        {"about": about, "choices": choices}, sort_keys=False, width=1000, default_flow_style=None
    )
    write_text(path, text)
