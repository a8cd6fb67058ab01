"""Runs of other stores are copied where they can be trusted, and refused where not."""

from __future__ import annotations

import io
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from costbp.cli import app
from costbp.config import Cell, load_plan
from costbp.errors import UserError
from costbp.files import intact, lock, seal_of
from costbp.train.merge import merge
from costbp.train.record import RECORD, STEPS, Record, Summary, read_record, write_run

SMOKE = Path("config/studies/smoke.yaml")
HEAD = Cell("tiny_head", "docstrings", "fmad_multiple", "units_400")
OTHER = Path("other/runs")


@pytest.fixture
def plan(workdir):
    return load_plan([SMOKE])


def put(plan, store: Path, cell: Cell = HEAD, seed: int = 0, **changed) -> Path:
    """A finished run in a store; its folder."""
    spec = plan.spec(cell, seed)
    record = Record(
        hash=spec.hash,
        spec=spec,
        outcome=changed.pop("outcome", "completed"),
        summary=Summary(**{"test_accuracy": 0.5, "steps": 1, "seconds": 1.0} | changed),
        environment={"commit": "abc"},
        finished=datetime(2026, 1, 1, tzinfo=UTC),
    )
    folder = spec.folder(store)
    write_run(folder, record, [{"step": 1, "loss": 1.0, "flops": 10}])
    return folder


def edit(folder: Path, change) -> None:
    """Change a record as its holder may."""
    found = json.loads((folder / RECORD).read_text())
    change(found)
    (folder / RECORD).write_text(json.dumps(found))


def test_good_runs_are_copied_as_they_are(plan, capsys):
    folders = [put(plan, OTHER, seed=seed) for seed in (0, 1)]
    (folders[0] / "checkpoint.pt").write_bytes(b"never copied")
    assert merge(plan, [OTHER]) == {"merged": 2, "here already": 0, "refused": 0}
    for folder in folders:
        here = plan.study.paths.store / folder.relative_to(OTHER)
        assert sorted(path.name for path in here.iterdir()) == [
            ".lock",
            seal_of(Path(RECORD)).name,
            RECORD,
            STEPS,
        ]
        for name in (RECORD, STEPS):
            assert (here / name).read_bytes() == (folder / name).read_bytes()
    assert merge(plan, [OTHER]) == {"merged": 0, "here already": 2, "refused": 0}
    assert capsys.readouterr().err == ""


def test_times_may_differ_and_figures_may_not(plan, capsys):
    here = put(plan, plan.study.paths.store, seed=0)
    put(plan, plan.study.paths.store, seed=1)
    before = (here / RECORD).read_bytes()
    put(plan, OTHER, seed=0, test_accuracy=0.6)
    put(plan, OTHER, seed=1, seconds=2.0)
    assert merge(plan, [OTHER]) == {"merged": 0, "here already": 1, "refused": 1}
    assert "has other figures or another outcome; both are kept" in capsys.readouterr().err
    assert (here / RECORD).read_bytes() == before


def test_a_failed_or_damaged_run_here_gives_way(plan):
    damaged = put(plan, plan.study.paths.store, seed=0)
    (damaged / STEPS).write_bytes(b"half")
    failed = put(plan, plan.study.paths.store, seed=1, outcome="failed")
    for seed in (0, 1):
        put(plan, OTHER, seed=seed)
    assert merge(plan, [OTHER])["merged"] == 2
    assert all(intact(folder / RECORD) for folder in (damaged, failed))
    assert {read_record(folder).outcome for folder in (damaged, failed)} == {"completed"}


def spoiled(name: str):
    """What a store may hold beside good runs, and what is said of it."""

    def parquet(folder: Path) -> None:
        table = pq.read_table(folder / STEPS).drop_columns(["loss"])
        target = io.BytesIO()
        pq.write_table(table, target)
        (folder / STEPS).write_bytes(target.getvalue())

    def linked(name: str):
        def link(folder: Path) -> None:
            (folder / name).rename(folder.parent / f".{name}")
            (folder / name).symlink_to(Path("..") / f".{name}")

        return link

    def linked_folder(folder: Path) -> None:
        away = Path("elsewhere").absolute()
        shutil.move(folder.parent, away)
        folder.parent.symlink_to(away)

    def elsewhere(cell: list[str]):
        return lambda folder: edit(folder, lambda record: record["spec"].update(cell=cell))

    away = str(Path("stolen").absolute())
    return {
        "seed": (lambda f: edit(f, lambda r: r["spec"].update(seed=7)), "and that of its spec"),
        "hash": (lambda f: edit(f, lambda r: r.update(hash="0" * 8)), "its hash is 00000000"),
        "key": (lambda f: edit(f, lambda r: r.update(more=1)), "of another version: more: Extra"),
        "half": (lambda f: (f / RECORD).write_bytes(b"{"), "record.json is damaged"),
        "steps": (lambda f: (f / STEPS).write_bytes(b"PAR1 PAR1"), "steps.parquet is damaged"),
        "columns": (parquet, "steps.parquet has other columns"),
        "gone": (lambda f: (f / STEPS).unlink(), "steps.parquet: No such file"),
        "failed": (lambda f: edit(f, lambda r: r.update(outcome="failed")), "the run failed"),
        "up": (elsewhere(["..", "..", "..", "esc"]), "its record is of '../../../esc"),
        "absolute": (elsewhere([away, "b", "c", "d"]), "its record is of '/"),
        "digit": (
            lambda f: edit(f, lambda r: r["summary"].update(test_accuracy=0.9)),
            "it has changed since it was written",
        ),
        "moved": (lambda f: f.rename(f.with_name(f"seed=9-{f.name[-8:]}")), "its record is of"),
        "file linked": (linked(RECORD), "record.json: is a symbolic link"),
        "steps linked": (linked(STEPS), "steps.parquet: is a symbolic link"),
        "folder linked": (linked_folder, "is a symbolic link"),
        "pipe": (lambda f: ((f / STEPS).unlink(), os.mkfifo(f / STEPS)), "is no plain file"),
    }[name]


SPOILED = (
    *("seed", "hash", "key", "half", "steps", "columns", "gone", "failed", "up", "absolute"),
    *("digit", "moved", "file linked", "steps linked", "folder linked", "pipe"),
)


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_trusted_is_refused_in_a_line_and_the_rest_merged(plan, capsys, name):
    spoil, words = spoiled(name)
    put(plan, OTHER, HEAD._replace(method="bp_checkpointing"))
    spoil(put(plan, OTHER))
    before = {path for path in Path().rglob("*") if "runs" not in path.parts[:1]}
    assert merge(plan, [OTHER]) == {"merged": 1, "here already": 0, "refused": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: 'other/runs/tiny_head") and words in line and len(line) < 600
    found = {path.parts[-2] for path in plan.study.paths.store.rglob(RECORD)}
    assert len(found) == 1 and len(list(plan.study.paths.store.rglob(STEPS))) == 1
    assert {path for path in Path().rglob("*") if "runs" not in path.parts[:1]} == before


def test_a_run_in_work_here_is_left_alone(plan, capsys):
    folder = put(plan, OTHER)
    with lock(plan.study.paths.store / folder.relative_to(OTHER) / ".lock"):
        assert merge(plan, [OTHER])["refused"] == 1
    assert "it is being run here" in capsys.readouterr().err


def test_the_command_counts_and_fails_where_something_is_refused(plan, capsys):
    assert app(["merge", str(put(plan, OTHER).parents[4]), "-c", str(SMOKE)], standalone_mode=False) in (None, 0)  # fmt: skip
    assert capsys.readouterr().out == "1 merged, 0 here already, 0 refused\n"
    edit(put(plan, OTHER, seed=1), lambda record: record.update(hash="0"))
    assert app(["merge", str(OTHER), "-c", str(SMOKE)], standalone_mode=False) == 1
    assert capsys.readouterr().out == "0 merged, 1 here already, 1 refused\n"


def test_methods_that_are_unknown_here_are_told(plan, capsys):
    put(plan, OTHER)
    known = {name: entry for name, entry in plan.catalog.methods.items() if name != HEAD.method}
    catalog = plan.catalog.model_copy(update={"methods": known})
    assert merge(plan.model_copy(update={"catalog": catalog}), [OTHER])["merged"] == 1
    assert "methods.yaml doesn't have: 'fmad_multiple'" in capsys.readouterr().err


def test_a_store_must_be_a_folder_and_another_one(plan):
    with pytest.raises(UserError, match="absent: is not a folder of runs"):
        merge(plan, [Path("absent")])
    with pytest.raises(UserError, match="runs: is this study's own store"):
        merge(plan, [plan.study.paths.store])
