"""Runs in MLflow, for browsing. The run store stays the truth; this can be rebuilt from it.

Idempotent: a run is found by its key tag before one is created, and metrics carry the run's own
time stamps, so logging twice adds nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from costbp.config.entries import short_hash
from costbp.config.study import Cell, Plan, RunSpec
from costbp.console import say
from costbp.errors import UserError, first_line
from costbp.files import ensure_folder, lock, sha256
from costbp.tracking.database import prepare
from costbp.tracking.entries import LAYOUT, Seed, means, place
from costbp.train.record import CHECKPOINT, Record, read_record

URI = "MLFLOW_TRACKING_URI"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # its own waits minutes for a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

KEY, FORM, DIGEST = "costbp.key", "costbp.layout", "costbp.digest"
CHUNK = 1000  # MLflow's limit of metrics a call
PATIENCE = 10.0  # seconds that a training process waits for a tracking server, once
REPORT = ("index.html", "claims.md", "claims.json", "tables/*", "figures/*.png")
TRAINING = {  # tags of an experiment: the UI opens its view of training runs, not that of GenAI
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "final.test_accuracy",
}


def tracking_uri(plan: Plan) -> str:
    """``MLFLOW_TRACKING_URI`` where set, else the study's local SQLite database."""
    return os.environ.get(URI) or f"sqlite:///{_own(plan)}"


def _own(plan: Plan) -> Path:
    return (plan.study.paths.mlflow / "mlflow.db").resolve()


def without_secrets(text: str) -> str:
    """A text whose addresses have lost their user and password."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def sync(plan: Plan) -> tuple[int, int]:
    """Bring MLflow up to date with the study's runs and its report; returns (added, finished).

    Raises:
        UserError: the tracking server can't be reached or refuses.
    """
    seeds = list(_seeds(plan, (spec for cell in plan.cells() for spec in plan.specs(cell))))
    with _told(plan) as shelf:
        added = shelf.put(seeds) if seeds else 0
        shelf.put_report()
    return added, sum(seed.record is not None for seed in seeds)


def experiment(plan: Plan) -> str:
    """MLflow's id of the study's experiment."""
    with _told(plan) as shelf:
        return shelf.experiment


def live(plan: Plan) -> Callable[[Record], None]:
    """What logs a run as it ends, where a tracking server is named. One that fails is asked no more:
    the run store holds what it missed."""
    served = bool(os.environ.get(URI))

    def log(record: Record) -> None:
        nonlocal served
        if not served:
            return  # importing MLflow takes seconds: the local store is filled once, at the end
        import mlflow.tracking  # noqa: F401  (not within the seconds below)

        flaw = _refusal(plan, f"no answer within {PATIENCE:.0f} seconds")

        def work() -> None:
            nonlocal flaw
            try:
                specs = {spec.hash: spec for spec in plan.specs(Cell(*record.spec.cell))}
                seeds = _seeds(plan, (specs | {record.hash: record.spec}).values())
                with _told(plan) as shelf:
                    shelf.put([seed for seed in seeds if seed.record is not None])
                flaw = ""
            except Exception as error:
                flaw = str(error) if isinstance(error, UserError) else _refusal(plan, error)

        thread = Thread(target=work, daemon=True)  # whatever a driver waits for, training goes on
        thread.start()
        thread.join(PATIENCE)
        if flaw:
            served = False
            say(f"warning: {flaw}; nor are later runs of this process logged")

    return log


def _seeds(plan: Plan, specs: Iterable[RunSpec]) -> Iterator[Seed]:
    """Runs that have finished or were interrupted. A damaged record is computed again by the
    workflow."""
    for spec in specs:
        folder = spec.folder(plan.study.paths.store)
        with contextlib.suppress(ValueError):
            record = read_record(folder)
            if record is None and (folder / CHECKPOINT).exists():
                with lock(folder / ".lock", wait=False) as free:
                    if free:
                        yield Seed(spec, folder, None)
            elif record is not None:
                yield Seed(spec, folder, record)


@contextlib.contextmanager
def _told(plan: Plan) -> Iterator[_Shelf]:
    """The study's experiment in MLflow; what MLflow raises becomes one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they print what they raise, too
    try:
        yield _Shelf(plan)
    except (MlflowException, SQLAlchemyError, OSError, sqlite3.Error) as error:
        raise UserError(_refusal(plan, error)) from error


def _refusal(plan: Plan, reason: BaseException | str) -> str:
    said = first_line(reason) if isinstance(reason, BaseException) else reason
    said = re.sub(r""".*Caused by \w+\(["'].*?\): (.*)["']\)\).*""", r"\1", said)  # of requests
    where = f"MLflow at {tracking_uri(plan)}: {said}; `costbp track` logs what is missing"
    return without_secrets(where)


class _Shelf:
    """An MLflow experiment, made at the first call, and the runs of ours in it by key."""

    def __init__(self, plan: Plan) -> None:
        from mlflow.tracking import MlflowClient

        uri, root = tracking_uri(plan), ensure_folder(plan.study.paths.mlflow)
        self.plan, self.lock, artifacts = plan, root / ".create.lock", None
        if uri.startswith("sqlite:///"):
            artifacts = ensure_folder(root / "artifacts" / plan.name).resolve().as_uri()
        if uri == f"sqlite:///{_own(plan)}":
            prepare(_own(plan))
        self.client = MlflowClient(uri)
        self.experiment = self._experiment(artifacts)
        self.known: dict[str, Any] = {}

    def _experiment(self, artifacts: str | None) -> str:
        tags = TRAINING | {"mlflow.note.content": self.plan.study.description}
        with lock(self.lock):
            found = self.client.get_experiment_by_name(self.plan.name)
            if found is None:
                return str(self.client.create_experiment(self.plan.name, artifacts, tags))
        for name in tags.keys() - found.tags.keys():
            self.client.set_experiment_tag(found.experiment_id, name, tags[name])
        return str(found.experiment_id)

    def put(self, seeds: Sequence[Seed]) -> int:
        """Bring runs up to date, each below its experiment's; returns how many finished ones were
        added."""
        cells: dict[tuple[str, ...], list[Seed]] = {}
        for seed in seeds:
            cells.setdefault(seed.spec.cell, []).append(seed)
        self._look(next(iter(cells)) if len(cells) == 1 else None)
        return sum(self._put_cell(cell, group) for cell, group in cells.items())

    def _look(self, cell: tuple[str, ...] | None) -> None:
        """Find what is there, of one experiment or of all."""
        names = Cell(*cell)._asdict() if cell else {}
        where = " and ".join(f"tags.{name} = '{value}'" for name, value in names.items())
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(
                [self.experiment], where, max_results=1000, page_token=token or None
            )
            self.known |= {run.data.tags.get(KEY, ""): run for run in page}
            token = page.token or None

    def _put_cell(self, cell: tuple[str, ...], seeds: list[Seed]) -> int:
        records = [seed.record for seed in seeds if seed.record is not None]
        key, end = "/".join(cell), max(seed.end for seed in seeds)
        names = Cell(*cell)._asdict() | {"study": self.plan.name}
        found = self.known.get(key)
        parent = (
            found.info.run_id
            if found
            else self._create(key, f"{cell[2]} {place(cell)}", min(s.start for s in seeds), names)
        )
        added = sum(self._put_seed(seed, parent) for seed in seeds)
        state = short_hash([f"{seed.key} {seed.end}" for seed in seeds])
        if found is None or found.data.tags.get(DIGEST) != state:
            self._fill(parent, list(means(records)))
            self.client.set_tag(parent, DIGEST, state)
            self.client.set_terminated(parent, "FINISHED", end)
        return added

    def _put_seed(self, seed: Seed, parent: str) -> bool:
        found = self.known.get(seed.key)
        if found is not None:
            is_it = found.data.tags.get(FORM) == LAYOUT and found.info.start_time == seed.start
            if is_it and found.info.status != "RUNNING":
                return False
            if not is_it:  # run again since, taken up after an interruption, or an older layout
                self.client.delete_run(found.info.run_id)
        tags = seed.tags(self.plan) | {"mlflow.parentRunId": parent}
        run = self._create(seed.key, seed.name, seed.start, tags)
        self._fill(run, list(seed.metrics()), seed.params())
        for path in seed.artifacts():
            self.client.log_artifact(run, str(path))
        self.client.set_terminated(run, seed.status, seed.end)
        return seed.record is not None

    def put_report(self) -> None:
        """Attach the study's report, where there is one, to a run of the study's own."""
        root = self.plan.study.paths.reports
        files = sorted(path for name in REPORT for path in root.glob(name))
        if not files:
            return
        state, start = short_hash([sha256(path) for path in files]), _changed(files)
        run = self._create(
            "report", f"report of {self.plan.name}", start, {"study": self.plan.name}
        )
        if self.client.get_run(run).data.tags.get(DIGEST) == state:
            return
        for path in files:
            folder = path.parent.relative_to(root)
            self.client.log_artifact(run, str(path), None if folder == Path() else str(folder))
        self.client.set_tag(run, DIGEST, state)
        self.client.set_terminated(run, "FINISHED", start)

    def _create(self, key: str, name: str, start: int, tags: Mapping[str, str]) -> str:
        """The id of the run with a key, which processes at the same time create once."""
        with lock(self.lock):
            where = f"tags.`{KEY}` = '{key}'"
            for run in self.client.search_runs([self.experiment], where, max_results=1):
                return str(run.info.run_id)
            every = {**tags, KEY: key, FORM: LAYOUT}
            return str(self.client.create_run(self.experiment, start, every, name).info.run_id)

    def _fill(self, run: str, metrics: list[Any], params: Mapping[str, Any] | None = None) -> None:
        from mlflow.entities import Param

        given = [Param(name, str(value)[:6000]) for name, value in (params or {}).items()]
        for first in range(0, max(len(metrics), 1), CHUNK):
            self.client.log_batch(run, metrics[first : first + CHUNK], () if first else given)


def _changed(files: Sequence[Path]) -> int:
    return int(1000 * max(path.stat().st_mtime for path in files))
