"""Running specs through the store: finished runs are kept, interrupted ones continue."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch

from costbp.assets.fetch import commits
from costbp.config.costs import card_bytes
from costbp.config.study import Plan, RunSpec
from costbp.console import say
from costbp.cost.ceiling import Arrangement, metered_arrangement, traced_arrangement
from costbp.cost.pairs import traced_cost
from costbp.cost.record import CostRecord
from costbp.cost.step import CostCounter
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.device import free, memory_of, name_of, out_of_memory, to_device
from costbp.device_pool import device_slot, largest_memory
from costbp.errors import UserError, first_line
from costbp.files import lock, write_json
from costbp.models.build import build_model
from costbp.models.loss import LOSSES
from costbp.objective import Objective
from costbp.train import checkpoint
from costbp.train.loop import Interrupted, Run, StepEvent, Watcher
from costbp.train.progress import watching
from costbp.train.record import (
    CHECKPOINT,
    ENOUGH,
    UNFIT,
    Outcome,
    Record,
    Row,
    Summary,
    environment,
    read_record,
    write_run,
)

WRITING = 20  # times the seconds that a checkpoint takes are left to training between two
MEMORY = "device bytes"  # in a record's environment: what the run might take


class Stop:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps."""

    def __init__(self) -> None:
        self.requested: int | None = None

    def __enter__(self) -> Stop:
        self._previous = {
            number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        self.requested = number


def run_specs(
    plan: Plan,
    specs: Iterable[RunSpec],
    *,
    test: bool = True,
    force: bool = False,
    done: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run specs one after the other in this process; what the store holds is not run again.

    Args:
        specs: may follow from the records of those before, of which ``done`` is told first.
        test: score the test split at the end (tuning trials must not).
        force: start runs although they don't fit by their traced memory.
        done: told of each record, also of those the store already held.

    Raises:
        UserError: interrupted (exit code 128 + signal), or a run failed; finished runs are kept.
    """
    records: list[Record] = []
    sessions: dict[tuple[str, ...], _Session] = {}  # the last pair's alone
    device: torch.device | None = None
    force = force or plan.study.start_unfit
    with Stop() as stop, contextlib.ExitStack() as stack:
        for spec in specs:
            folder = spec.folder(plan.study.paths.store)
            with lock(folder / ".lock"):
                record = finished(folder, _memory(plan, None), force=force)
                if record is None:
                    device = device or stack.enter_context(device_slot(plan.study.device))
                    pair = spec.cell[:2]
                    if pair not in sessions:
                        sessions = {pair: _Session(plan, spec, device)}
                    record = sessions[pair].run(spec, folder, stop, test=test, force=force)
            records.append(record)
            done(record)
    failures = [record for record in records if record.outcome == "failed"]
    if failures:
        first = failures[0]
        raise UserError(f"{'/'.join(first.spec.cell)} seed {first.spec.seed}: {first.message}", 1)
    return records


def finished(folder: Path, memory: int | None = None, *, force: bool = False) -> Record | None:
    """The record of a run that needn't be run again.

    A damaged or failed one is run again; so is one that was too large for a device, if there is
    more ``memory`` (bytes) now or, where it was not even started, if that is forced.
    """
    try:
        record = read_record(folder)
    except ValueError as error:
        say(f"warning: {error}; the run is computed again")
        return None
    if record is None or record.outcome == "failed":
        return None
    if record.outcome in UNFIT:
        then = int(record.environment.get(MEMORY, 0))
        if (memory is not None and memory > then) or (force and record.outcome == "does_not_fit"):
            return None
    return record


def _memory(plan: Plan, device: torch.device | None) -> int | None:
    """Bytes that a run may take: what the study says, or else the device's own."""
    if plan.study.resources.memory is not None:
        return card_bytes(plan.study.resources.memory)
    return largest_memory(plan.study.device) if device is None else memory_of(device)


class _Session:
    """What runs on one (model, task) share: the device, the data, and the cost of their steps."""

    def __init__(self, plan: Plan, spec: RunSpec, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.assets = plan.study.paths.cache / "assets"
        self.data = load_prepared(prepare(Pair.of(plan, *spec.cell[:2])))
        self.counters: dict[str, CostCounter] = {}
        self.memory = _memory(plan, device)

    def run(
        self, spec: RunSpec, folder: Path, stop: Stop, *, test: bool, force: bool = False
    ) -> Record:
        """Bring a run to its outcome and store it. Whatever happens leaves the device free."""
        facts = environment(name_of(self.device)) | {
            f"read {name}": commit
            for name, commit in commits(spec.assets, self.plan.study.paths.cache).items()
        }
        if self.memory is not None:
            facts[MEMORY] = str(self.memory)
        arranged = traced_arrangement(self.plan, spec)
        predicted = arranged or self._predicted(spec)
        needed = None if predicted is None else predicted.bytes
        if arranged is not None and not arranged.fits:
            ended = Ended("does_not_fit", arranged.message, self._nothing(arranged))
        elif needed is not None and self.memory is not None and needed > self.memory and not force:
            ended = Ended("does_not_fit", self._too_large(needed), self._nothing(predicted))
        else:
            ended = self._ended(spec, arranged, folder, stop, test=test)
        record = Record(
            hash=spec.hash,
            spec=spec,
            outcome=ended.outcome,
            message=ended.message,
            summary=ended.summary.model_copy(update={"predicted_bytes": needed}),
            environment=facts,
            finished=datetime.now(UTC).replace(microsecond=0),
        )
        write_run(folder, record, ended.rows)
        accuracy = record.summary.test_accuracy
        shown = "" if accuracy is None else f", test accuracy {accuracy:.3f}"
        say(
            f"{_title(spec)}: {ended.outcome}{shown}{f' ({ended.message})' if ended.message else ''}"
        )
        return record

    def _ended(
        self, spec: RunSpec, arranged: Arrangement | None, folder: Path, stop: Stop, *, test: bool
    ) -> Ended:
        """A run from its model to its last score; running out of memory is a result at any moment."""
        title = _title(spec)
        run: Run | None = None
        outcome: Outcome = "failed"
        try:
            run = self._build(spec, arranged)
            if run.arrangement is not None and not run.arrangement.fits:
                outcome, message = "does_not_fit", run.arrangement.message
                return Ended(outcome, message, run.summary(test=False))
            if not _resume(run, folder, title):
                run = None  # it may hold half a checkpoint
                run = self._build(spec, arranged)
            with watching(title, folder) as show:
                outcome, message = run.train(self._with_checkpoints(run, folder, stop, show))
            summary = run.summary(test=test)
            if test and outcome == "completed" and run.spent() < ENOUGH:
                say(
                    f"warning: {title}: {100 * run.spent():.0f} % of the budget is spent, and another "
                    f"step would exceed it; a larger budget is fairer to this method"
                )
            return Ended(outcome, message, summary, run.state.rows)
        except Interrupted:
            assert run is not None
            raise UserError(
                f"{title}: interrupted at step {run.state.step}; the next run continues from there",
                128 + (stop.requested or signal.SIGINT),
            ) from None
        except Exception as error:
            outcome, message = "failed", first_line(error)
            if out_of_memory(error):
                outcome = "out_of_memory"
            elif not isinstance(error, UserError | ValueError):
                traceback.print_exc()
                message = f"{type(error).__name__}: {message}"
            summary = self._nothing() if run is None else run.summary(test=False)
            return Ended(outcome, message, summary, run.state.rows if run else ())
        finally:
            run = None
            if outcome == "out_of_memory" or self.device.type != "cpu":
                free(self.device)

    def _build(self, spec: RunSpec, arranged: Arrangement | None) -> Run:
        data, device = self.data, self.device
        module = build_model(
            spec.model, len(data.names), self.assets, spec.seed, data.width, device, data.words
        )
        if arranged is None and spec.budget.peak_memory is not None:
            train = data.splits["train"]
            largest = to_device(train.batch(train.order()[-spec.task.batch_size :]), device)
            objective = Objective(module, LOSSES[spec.task.objective])
            arranged = metered_arrangement(self.plan, spec, objective, largest)
        run = Run(spec, module, data, device, self.assets, arranged)
        key = f"{self.plan.cost_key(*spec.cell[:3])} {arranged.text if arranged else ''}"
        run.cost_of = self.counters.setdefault(key, run.cost_of)
        return run

    def _with_checkpoints(self, run: Run, folder: Path, stop: Stop, show: Watcher) -> Watcher:
        """A watcher that saves the run's state now and then, and where it is asked to stop."""
        every = self.plan.study.resources.checkpoint_seconds
        due = time.monotonic() + every

        def watch(event: StepEvent) -> None:
            nonlocal due
            show(event)
            if stop.requested or time.monotonic() >= due:
                start = time.monotonic()
                try:
                    checkpoint.save(run.state_dict(), folder / CHECKPOINT)
                except UserError as error:  # a full disk may have room again when the run ends
                    say(f"warning: {error}; {_title(run.spec)} goes on without a checkpoint")
                end = time.monotonic()
                due = end + (every and max(every, WRITING * (end - start)))
            if stop.requested:
                raise Interrupted

        return watch

    def _predicted(self, spec: RunSpec) -> CostRecord | None:
        """The traced cost of a step, where there is a memory that it could exceed."""
        return None if self.memory is None else traced_cost(self.plan, *spec.cell[:3])

    def _nothing(self, predicted: CostRecord | Arrangement | None = None) -> Summary:
        """Figures of a run that never began."""
        d, majority = predicted.d if predicted else 0, self.data.facts["majority"]["test"]
        known = predicted.figures if isinstance(predicted, Arrangement) else {}
        return Summary(majority=majority, d=d, **known)

    def _too_large(self, needed: int) -> str:
        return (
            f"a step needs {needed / 2**30:.2f} GiB by its trace, and the device has "
            f"{(self.memory or 0) / 2**30:.2f} GiB; start_unfit: true starts it all the same"
        )


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    outcome: Outcome
    message: str
    summary: Summary
    rows: Sequence[Row] = ()


def _title(spec: RunSpec) -> str:
    return f"{'/'.join(spec.cell)} seed {spec.seed}"


def _resume(run: Run, folder: Path, title: str) -> bool:
    """Continue from a checkpoint, if there is one; False where it can't be used."""
    path = folder / CHECKPOINT
    if path.exists():
        try:
            run.load_state_dict(checkpoint.load(path, run.device))
        except Exception as error:
            say(f"warning: {path} can't be used ({first_line(error)}); starting from step 0")
            return False
        say(f"{title}: continuing from step {run.state.step}")
    return True


def write_manifest(path: Path, records: Sequence[Record], store: Path) -> None:
    """What Snakemake sees of a job's experiments: which runs they consist of and how they ended."""
    runs = [
        {
            "cell": list(record.spec.cell),
            "seed": record.spec.seed,
            "hash": record.hash,
            "outcome": record.outcome,
            "folder": str(record.spec.folder(store).relative_to(store)),
        }
        for record in records
    ]
    write_json(path, {"runs": runs})
