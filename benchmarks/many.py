"""How long a study of many runs takes from its store to its page, and how much memory.

``python -m benchmarks.many`` writes a store of 10,000 synthetic runs, of 200 steps and 13 evaluations
each, in the default study's manner, and runs the workflow's commands on it, each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from costbp.config.load import load_plan
from costbp.config.study import Block, Plan
from costbp.config.tuning import Choices, Setting, Tuned
from costbp.console import say, table
from costbp.cost.record import CostRecord, write_costs
from costbp.files import write_text
from costbp.train.record import Record, Row, Summary, write_run

STEPS, EVALUATIONS, SEEDS = 200, 13, 5
UNITS = 1200.0
MODELS = {  # and what they train
    "minilm_words": 1_536,
    "minilm_words_r32": 49_152,
    "minilm_random": 3_846,
    "minilm_block": 1_775_000,
    "minilm_head": 2_310,
}
TASKS = ("trec", "movie_reviews", "boolq", "agnews", "multirc")
BUDGETS = ("units_1200", "units_600", "units_4k", "units_8k")
COMMANDS = ("aggregate", "tables", "figures", "claims", "report")


def study(runs: int) -> Plan:
    """A plan of so many runs: products of names, as the default study's, many methods on each."""
    plan = load_plan()
    each = -(-runs // (SEEDS * len(MODELS) * len(TASKS) * len(BUDGETS)))
    methods = tuple(islice(plan.catalog.methods, each))
    assert len(methods) == each, "the catalog has too few methods"
    methods = tuple(dict.fromkeys(("bp_checkpointing", *methods)))[:each]
    block = Block(models=tuple(MODELS), tasks=TASKS, methods=methods, budgets=BUDGETS)
    update = {"experiments": (block,), "seeds": tuple(range(SEEDS)), "trace_claims": False}
    plan = plan.model_copy(update={"study": plan.study.model_copy(update=update)})
    tuned: Choices = {}
    for cell in plan.cells():  # as if tuned, since nothing is concluded of what isn't
        used = plan.choice(cell)
        setting = Setting(**used.optimizer.model_dump(), eps=used.eps)
        place = tuned.setdefault(cell.model, {}).setdefault(cell.task, {})
        found = Tuned(key=plan.tuning_key(cell), choice=setting)
        place.setdefault(cell.method, {})[cell.budget] = found
    return plan.model_copy(update={"tuned": tuned})


def rows(rng: np.random.Generator, end: float, d: int) -> tuple[list[Row], Summary]:
    """The steps of a run that ends at about ``end``, and its summary."""
    found: list[dict[str, Any]] = []
    at = set(np.unique(np.geomspace(1, STEPS, EVALUATIONS).astype(int)).tolist()) | {0, STEPS}
    norms, noise = rng.lognormal(size=STEPS + 1), 0.01 * rng.normal(size=(STEPS + 1, 2))
    accuracy = loss = 0.0
    for step in range(STEPS + 1):
        units = UNITS * step / STEPS
        spent = {"forward_units": units, "flops": int(1e9 * units), "seconds": units / 100}
        if step:
            own = {"loss": 1.8 - end * (1 - np.exp(-units / 150)) + noise[step, 0]}
            found.append({"step": step, **spent, **own, "gradient_norm": float(norms[step])})
        if step in at:
            accuracy = float(np.clip(0.4 + (end - 0.4) * (1 - np.exp(-units / 150)), 0, 1))
            accuracy, loss = round(240 * (accuracy + noise[step, 1])) / 240, 1.8 - accuracy
            scores = {"validation_accuracy": accuracy, "validation_loss": loss}
            found.append({"step": step, **spent, **scores})
    summary = Summary(
        test_accuracy=round(500 * end) / 500,
        test_loss=1.8 - end,
        validation_accuracy=accuracy,
        validation_loss=loss,
        best_validation_accuracy=accuracy,
        steps=STEPS,
        forward_units=UNITS,
        flops=int(1e9 * UNITS),
        seconds=UNITS / 100,
        evaluation_seconds=1.0,
        peak_bytes=5_000_000,
        state_bytes=100_000,
        weights_bytes=90_000_000,
        rss_bytes=2**29,
        d=d,
        majority=0.23,
        learning_rate=1e-3,
        step_seconds=0.06,
        forward_seconds=0.01,
    )
    return found, summary  # type: ignore[return-value]


def fill(plan: Plan) -> int:
    """Write every run of the plan, and its costs; returns how many runs."""
    rng, count = np.random.default_rng(0), 0
    facts = dict.fromkeys(("costbp", "torch", "transformers", "peft", "numpy", "python"), "1.0")
    facts |= {"device": "cpu", "machine": "x86_64", "commit": "0" * 12}
    for cell in plan.cells():
        end = 0.5 + 0.4 * rng.random()
        for spec in plan.specs(cell):
            steps, summary = rows(rng, end + 0.015 * rng.normal(), MODELS[cell.model])
            record = Record(
                hash=spec.hash,
                spec=spec,
                outcome="completed",
                summary=summary,
                environment=facts,
                finished=datetime.now(UTC).replace(microsecond=0),
            )
            write_run(spec.folder(plan.study.paths.store), record, steps)
            count += 1
    for (model, task), methods in plan.pairs().items():
        figures: dict[str, Any] = dict.fromkeys(
            ("forward_units", "closed_form", "flops", "forward_flops"), 2.0
        )
        figures |= dict.fromkeys(("peak_bytes", "state_bytes", "weights_bytes", "batch", "seq"), 1)
        figures |= {"peak_by_category": {"weights": 1}, "d": 1, "device": "cpu"}
        entries = [{"model": model, "task": task, "method": name, **figures} for name in methods]
        found = [CostRecord.model_validate(entry) for entry in entries]
        write_costs(plan.results / "cost" / model / f"{task}.json", found)
    return count


def timed(words: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of a processor, and GiB at its peak, of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "costbp", *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise typer.Exit(process.returncode)
    worked = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, worked, usage.ru_maxrss / 2**20


def main(
    runs: Annotated[int, typer.Option(min=100, help="About so many runs.")] = 10_000,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write, and to leave, the store.")
    ] = None,
) -> None:
    """Make a store of many runs, and time what follows from it."""
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        plan = study(runs)
        update = {name: place / name for name in ("store", "cache", "results", "reports", "mlflow")}
        paths = plan.study.paths.model_copy(update=update)
        plan = plan.model_copy(update={"study": plan.study.model_copy(update={"paths": paths})})
        frozen = place / "plan.json"
        if not frozen.exists():
            start = time.perf_counter()
            count = fill(plan)
            write_text(frozen, plan.model_dump_json())
            say(f"{count} runs written in {time.perf_counter() - start:.0f} s")
        found = {name: timed([name, "--plan", str(frozen)]) for name in COMMANDS}
    seconds, worked, most = zip(*found.values(), strict=True)
    found["in all"] = sum(seconds), sum(worked), max(most)
    lines = [(name, *(f"{x:.1f}" for x in values)) for name, values in found.items()]
    table("", ("command", "seconds", "processor seconds", "GiB"), lines)


if __name__ == "__main__":
    typer.run(main)
