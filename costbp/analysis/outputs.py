"""The figures of both pages: what each shows and who draws it.

Apart from the drawing, which takes seconds to import: a figure names its function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    Attributes:
        name: of its files.
        caption: what a reader should know of it.
        frame: what it is drawn from: runs, curves, trials, steps or profiles of a
            study, or traces, sweeps or fits.
        by: module of this room and function that draws it, from a plan and that frame.
        options: what else the function is given.
        spread: what shows the interval over seeds, where there are several.
    """

    name: str
    caption: str
    frame: str
    by: str
    options: Mapping[str, str] = field(default_factory=dict)
    spread: str = ""

    def draw(self, plan: Any, frame: Any) -> Any:
        """The figure as matplotlib's."""
        module, function = self.by.split(".")
        drawing = getattr(import_module(f"costbp.analysis.{module}"), function)
        return drawing(plan, frame, **self.options)

    def words(self, seeds: int) -> str:
        """The caption, for runs of ``seeds`` seeds."""
        several = f" Means over seeds; {self.spread} are their 95 % intervals (Student's t)."
        return self.caption + (several if self.spread and seeds > 1 else "")


def _curve(name: str, caption: str, x: str, y: str) -> Figure:
    caption += (
        " The reference and the best FmAD and ZO methods, chosen on the validation split, stand out; "
        "a line ends where the first of its seeds ends."
    )
    return Figure(name, caption, "curves", "figures.curve", {"x": x, "y": y}, "bands")


REPORT = (
    _curve(
        "accuracy_units",
        "Validation accuracy against forward units: equal abscissa is equal compute. The dotted "
        "line is the majority class.",
        "forward_units",
        "validation_accuracy",
    ),
    _curve(
        "accuracy_seconds",
        "Validation accuracy against training seconds, evaluation excluded.",
        "seconds",
        "validation_accuracy",
    ),
    _curve(
        "loss_units",
        "Validation loss against forward units.",
        "forward_units",
        "validation_loss",
    ),
    Figure(
        "memory_accuracy",
        "Test accuracy at the end of the same budget against the peak memory of a step, beyond "
        "weights (filled) and with them (hollow). The lines join the methods that no other beats in "
        "both. Up and to the left is better.",
        "runs",
        "figures.memory_accuracy",
        spread="bars",
    ),
    Figure(
        "tuning",
        "Validation accuracy in %, against the learning rate: each method's first, shortest trials. "
        "Dots are the rates that were chosen; in brackets, how many of a method's rates come within "
        "5 points of its best.",
        "trials",
        "figures.tuning",
    ),
    Figure(
        "profiles",
        "Performance profiles (Dolan and More 2002): in how many of the problems (a model, task, budget "
        "and seed) a method reaches the target at no more than so many times the least forward units. "
        "Methods that never do are not drawn.",
        "profiles",
        "figures.profile",
    ),
    Figure(
        "jumps",
        "Directional derivatives of single steps, root mean square over a step's directions: one "
        "seed of the best FmAD and ZO methods. Jumps are what makes a run unstable.",
        "steps",
        "figures.jumps",
    ),
)

COSTS = (
    Figure(
        "memory",
        "Bytes at the peak of a step beyond the frozen weights, by what they are for.",
        "traces",
        "cost_figures.memory",
    ),
    Figure(
        "flops",
        "Forward units of an optimiser step: counted FLOPs over those of one no-grad forward.",
        "traces",
        "cost_figures.flops",
    ),
    Figure(
        "pareto",
        "Forward units against bytes beyond weights. The line joins the methods that no other "
        "beats in both. It says nothing of how much a step learns.",
        "traces",
        "cost_figures.pareto",
    ),
    Figure("sweeps", "One key at a time, all others held.", "sweeps", "cost_figures.sweeps"),
    Figure(
        "fits",
        "The largest batch that each method can train on a card, with room left for its driver.",
        "fits",
        "cost_figures.fits",
    ),
)
