"""Simulated studies: records of runs whose truth is known, in the default study's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from costbp.analysis.arms import Evidence, depth
from costbp.analysis.claims import judge
from costbp.analysis.frames import Frames
from costbp.config.study import Block, Plan

SEEDS = (0, 1, 2, 3, 4)
UNITS = 2000.0
SHARES = np.array([0, *np.geomspace(0.002, 1, 12)])  # of the budget, where runs are evaluated
START, FINAL, PACE = 0.4, 0.7, 150.0  # accuracy at the start, at the end; units to most of the way
MAJORITY = 0.23
D = {
    "minilm_words": 1_536,
    "minilm_words_r32": 49_152,
    "minilm_random": 3_846,
    "minilm_block": 1_775_000,
}
MANY = (
    *("bp_vanilla", "bp_checkpointing", "fmad_vanilla", "fmad_accumulate", "fmad_multiple"),
    *("zo_vanilla", "zo_multiple", "fzoo"),
)
FOUR = ("bp_checkpointing", "fmad_multiple", "zo_vanilla", "zo_multiple")
SIX = ("bp_checkpointing", "fmad_vanilla", "zo_vanilla", "zo_multiple", "lozo", "hizoo")


@dataclass(frozen=True)
class Truth:
    """What a method really does.

    Attributes:
        final: accuracy at the end, by the model (a single number: on all).
        pace: units after which two thirds of the way are done.
    """

    final: float | Mapping[str, float] = FINAL
    pace: float = PACE

    def of(self, model: str) -> float:
        return self.final if isinstance(self.final, float) else self.final.get(model, FINAL)


def study(plan: Plan, scale: str = "full") -> Plan:
    """A plan of the default study's shape, a third of its size."""
    cells = [
        ("minilm_words", "trec", MANY),
        ("minilm_words", "movie_reviews", FOUR),
        ("minilm_words_r32", "trec", FOUR),
        ("minilm_random", "trec", FOUR),
        ("minilm_block", "trec", SIX),
    ]
    blocks = tuple(
        Block(models=(model,), tasks=(task,), methods=tuple(methods), budgets=("units_4k",))
        for model, task, methods in cells
    )
    update = {"experiments": blocks, "seeds": SEEDS, "scale": scale}
    return plan.model_copy(update={"study": plan.study.model_copy(update=update)})


def simulate(
    plan: Plan,
    truth: Mapping[str, Truth] | None = None,
    seed: int = 0,
    own: float = 0.015,
    shared: float = 0.01,
    noise: float = 0.01,
) -> Frames:
    """Frames of one study.

    Args:
        truth: by method; a method without one does what all do.
        own, shared: spread of the end over seeds, a run's own and that of the seed's batches, which all
            methods share.
        noise: of an evaluation, half of it shared by all runs, who are scored on the same examples.
    """
    rng = np.random.default_rng(seed)
    runs, parts = [], []
    batches = {s: shared * rng.normal() for s in SEEDS}
    examples = noise * np.sqrt(0.5) * rng.normal(size=len(SHARES))
    entries = plan.catalog.methods
    for cell in plan.cells():
        does = (truth or {}).get(cell.method, Truth())
        for s in plan.seeds(cell):
            end = does.of(cell.model) + batches.get(s, 0.0) + own * rng.normal()
            units = SHARES * UNITS
            curve = START + (end - START) * (1 - np.exp(-units / does.pace))
            curve += examples + noise * np.sqrt(0.5) * rng.normal(size=len(SHARES))
            curve = np.round(np.clip(curve, 0, 1) * 240) / 240
            names = {**cell._asdict(), "seed": s}
            steps = np.round(1000 * units / (depth(entries[cell.method]) or 1)) / 1000
            runs.append(
                {
                    **names,
                    "family": entries[cell.method].family,
                    "folder": f"runs/{'/'.join(cell)}/seed={s}",
                    "tuned": True,
                    "outcome": "completed",
                    "message": "",
                    "test_accuracy": round(end * 500) / 500,
                    "majority": MAJORITY,
                    "d": D[cell.model],
                    "steps": int(UNITS / 2),
                    "peak_bytes": 5e6,
                    "state_bytes": 1e5,
                    "weights_bytes": 9e7,
                    "spikes": 0,
                    "spike_loss": np.nan,
                    "commit": "abc",
                }
            )
            parts.append((names, steps, units, curve))
    columns = {
        name: np.concatenate([np.repeat(names[name], len(SHARES)) for names, *_ in parts])
        for name in ("model", "task", "method", "budget", "seed")
    }
    steps, units, accuracy = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    loss = 1.8 - accuracy + 0.05 * rng.random(len(accuracy))
    curves = pd.DataFrame(
        columns
        | {"step": steps, "forward_units": units, "flops": 1e9 * units, "seconds": units / 100}
        | {"validation_accuracy": accuracy, "validation_loss": loss}
    )
    return Frames(pd.DataFrame(runs), curves, pd.DataFrame())


def found(plan, frames, traces=None) -> dict[str, dict]:
    return {claim["id"]: claim for claim in judge(Evidence(plan, frames, traces or {}))}


def only(plan, *names, **update):
    """A plan with some claims alone, one of which may be changed."""
    claims = {name: plan.claims[name].model_copy(update=update) for name in names}
    return plan.model_copy(update={"claims": claims})


def others(truth: Truth, plan) -> dict[str, Truth]:
    methods = plan.catalog.methods
    return {name: truth for name, entry in methods.items() if entry.family != "bp"}
