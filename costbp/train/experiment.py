"""Running specs through the store: finished runs are kept, interrupted ones continue."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch

from costbp.assets.fetch import commits
from costbp.config.study import Cell, Plan, RunSpec
from costbp.console import say
from costbp.errors import UserError
from costbp.estimators import build_estimator
from costbp.files import atomic, lock, write_json
from costbp.measure.step import CostCounter
from costbp.models.build import build_model
from costbp.models.prepare import Prepared, load_prepared, prepare
from costbp.train.devices import device_slot
from costbp.train.loop import Interrupted, Run
from costbp.train.loop import Progress as Step
from costbp.train.progress import watching
from costbp.train.record import (
    CHECKPOINT,
    Outcome,
    Record,
    environment,
    read_record,
    write_run,
)

CHECKPOINT_SECONDS = 20.0
NONE: Mapping[str, str] = MappingProxyType({})


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
    specs: Sequence[RunSpec],
    *,
    test: bool = True,
    done: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run specs one after the other in this process; what the store holds is not run again.

    Args:
        test: score the test split at the end (tuning trials must not).
        done: told of each record, also of those the store already held.

    Raises:
        UserError: interrupted (exit code 128 + signal), or a run failed; finished runs are kept.
    """
    records: list[Record] = []
    data: Prepared | None = None
    costs: dict[str, CostCounter] = {}
    with Stop() as stop, contextlib.ExitStack() as stack:
        device: torch.device | None = None
        for spec in specs:
            folder = spec.folder(plan.study.paths.store)
            with lock(folder / ".lock"):
                record = finished(folder)
                if record is None:
                    if data is None or device is None:
                        model, task = spec.cell[:2]
                        data = load_prepared(prepare(plan, model, task))
                        slots = plan.study.paths.cache / "devices"
                        device = stack.enter_context(device_slot(plan.study.device, slots))
                    one = _build(spec, data, device, plan, costs)
                    read = commits(spec.assets, plan.study.paths.cache)
                    record = run(one, folder, stop, test=test, commits=read)
            records.append(record)
            done(record)
    failures = [record for record in records if record.outcome == "failed"]
    if failures:
        first = failures[0]
        raise UserError(f"{'/'.join(first.spec.cell)} seed {first.spec.seed}: {first.message}", 1)
    return records


def finished(folder: Path) -> Record | None:
    """The record of a run that needn't be run again; a damaged or failed one is run again."""
    try:
        record = read_record(folder)
    except ValueError as error:
        say(f"warning: {error}; the run is computed again")
        return None
    return None if record is None or record.outcome == "failed" else record


def _build(
    spec: RunSpec, data: Prepared, device: torch.device, plan: Plan, costs: dict[str, CostCounter]
) -> Run:
    assets = plan.study.paths.cache / "assets"
    module = build_model(spec.model, len(data.names), assets, spec.seed, data.width)
    counter = costs.setdefault(
        plan.cost_key(*spec.cell[:3]), CostCounter(build_estimator(spec.method))
    )
    return Run(spec, module, data, device, counter, assets)


def run(
    one: Run, folder: Path, stop: Stop, *, test: bool, commits: Mapping[str, str] = NONE
) -> Record:
    """Bring a run to its outcome and store it, with the commits of the repositories it read."""
    spec = one.spec
    title = f"{'/'.join(spec.cell)} seed {spec.seed}"
    _resume(one, folder, title)
    message = ""
    outcome: Outcome
    try:
        with watching(title, folder) as show:
            outcome, message = one.train(_with_checkpoints(one, folder, stop, show))
    except Interrupted:
        raise UserError(
            f"{title}: interrupted at step {one.state.step}; the next run continues from there",
            128 + (stop.requested or signal.SIGINT),
        ) from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        outcome, message = "out_of_memory", _first_line(error)
    except (UserError, ValueError) as error:
        outcome, message = "failed", _first_line(error)
    except Exception as error:
        traceback.print_exc()
        outcome, message = "failed", f"{type(error).__name__}: {_first_line(error)}"
    usable = outcome in ("completed", "diverged") and one.objective.finite()
    record = Record(
        hash=spec.hash,
        spec=spec,
        outcome=outcome,
        message=message,
        summary=one.summary(test=test and usable),
        environment=environment(_name(one.device)) | {f"read {k}": v for k, v in commits.items()},
        finished=datetime.now(UTC).replace(microsecond=0),
    )
    write_run(folder, record, one.state.rows)
    accuracy = record.summary.test_accuracy
    shown = "" if accuracy is None else f", test accuracy {accuracy:.3f}"
    say(f"{title}: {outcome}{shown}{f' ({message})' if message else ''}")
    return record


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _resume(one: Run, folder: Path, title: str) -> None:
    path = folder / CHECKPOINT
    if not path.exists():
        return
    try:
        one.load_state_dict(torch.load(path, map_location=one.device, weights_only=True))
    except Exception as error:
        say(f"warning: {path} can't be used ({_first_line(error)}); starting from step 0")
    else:
        say(f"{title}: continuing from step {one.state.step}")


def _with_checkpoints(one: Run, folder: Path, stop: Stop, show: Any) -> Any:
    last = time.monotonic()

    def watch(step: Step) -> None:
        nonlocal last
        show(step)
        if stop.requested or time.monotonic() - last > CHECKPOINT_SECONDS:
            last = time.monotonic()
            with atomic(folder / CHECKPOINT) as temporary:
                torch.save(one.state_dict(), temporary)
        if stop.requested:
            raise Interrupted

    return watch


def write_manifest(path: Path, cell: Cell, records: Sequence[Record], store: Path) -> None:
    """What Snakemake sees of an experiment: which runs it consists of and how they ended."""
    write_json(
        path,
        {
            "cell": list(cell),
            "runs": [
                {
                    "seed": record.spec.seed,
                    "hash": record.hash,
                    "outcome": record.outcome,
                    "folder": str(record.spec.folder(store).relative_to(store)),
                }
                for record in records
            ],
        },
    )
