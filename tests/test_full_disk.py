"""A file that can't be written whole: one line that names it, nothing left of it, whoever writes."""

from __future__ import annotations

import contextlib
import errno
import resource
import sqlite3
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from costbp.cli import app
from costbp.cli.app import main
from costbp.errors import UserError
from costbp.files import atomic, writing
from tests.disks import disk, remount

ROOM = 2**14  # bytes of a file
NUMBERS = torch.rand(100_000)


@contextlib.contextmanager
def small_files():
    """Files that can't grow beyond a few pages: what a quota does, without mounting anything."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def draw(path: Path) -> None:
    figure, axis = plt.subplots()
    axis.scatter(NUMBERS[:3000], NUMBERS[3000:6000])
    try:
        figure.savefig(path, format="svg")
    finally:
        plt.close(figure)


WRITERS = {
    "text": lambda path: path.write_text("x" * 10 * ROOM),
    "torch": lambda path: torch.save({"theta": NUMBERS}, path),
    "safetensors": lambda path: save_file({"theta": NUMBERS}, path),
    "arrow": lambda path: pq.write_table(pa.table({"x": NUMBERS.numpy()}), path),
    "pandas": lambda path: pd.DataFrame({"x": NUMBERS}).to_parquet(path),
    "matplotlib": draw,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_without_room_ends_in_one_line_and_leaves_nothing(tmp_path, name):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("as it was")
    with small_files(), pytest.raises(UserError) as caught, atomic(path) as temporary:
        WRITERS[name](temporary)
    said = str(caught.value)
    assert said.startswith(f"cannot write {path}: ") and "\n" not in said
    assert said.endswith(f"MiB are free in {path.parent}")
    assert [found.name for found in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "as it was"


def test_a_database_without_room_is_told_too(tmp_path):
    path = tmp_path / "mlflow.db"
    with (
        small_files(),
        pytest.raises(UserError, match=r"mlflow\.db: (database or disk is full|disk I/O error); "),
        writing(path),
        contextlib.closing(sqlite3.connect(path)) as connection,
    ):
        connection.execute("create table metrics (value text)")
        connection.executemany("insert into metrics values (?)", [("x" * 1000,)] * 100)
        connection.commit()


def test_errors_of_another_kind_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic(tmp_path / "file"):
        raise RuntimeError("shapes don't agree")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_finds_no_room_elsewhere_is_one_line(monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/.lock")

    monkeypatch.setitem(main.__globals__, "app", full)
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("costbp: cannot write runs/a/.lock: No space left on device; ")
    assert said.endswith("MiB are free in runs/a\n") and said.count("\n") == 1


HEAD = "-m tiny_head -t docstrings"
FOLDERS = {  # of paths: KiB that don't suffice, and a command that writes there
    "cache": (64, f"prepare {HEAD}"),
    "store": (8, f"train {HEAD} -M bp_checkpointing -b units_400"),
    "results": (8, "aggregate"),
    "reports": (64, "figures"),
}


def test_every_folder_may_be_full_and_the_next_start_heals(workdir, capsys):
    """The stages one after the other, each first without room and then with it."""
    overlay = {
        "paths": {name: f"{name}/in" for name in FOLDERS},
        "experiments": [
            {
                "models": ["tiny_head"],
                "tasks": ["docstrings"],
                "methods": ["bp_checkpointing"],
                "budgets": ["units_400"],
            }
        ],
    }
    Path("small.yaml").write_text(yaml.safe_dump(overlay))
    options = ["-c", "config/studies/smoke.yaml", "-c", "small.yaml"]
    out = "results/in/smoke/cost/tiny_head/docstrings.json"
    cost = ["cost", *HEAD.split(), "-M", "bp_checkpointing", "--out", out, *options]
    with contextlib.ExitStack() as disks:
        for name, (kib, words) in FOLDERS.items():
            command, folder = [*words.split(), *options], workdir / name
            disks.enter_context(disk(folder, 2**14))
            if name == "results":
                app(cost, standalone_mode=False)
            remount(folder, f"size={kib}k")
            with pytest.raises(
                UserError, match=rf"^cannot write .*{name}/in/.*MiB are free in [^\n]*$"
            ):
                app(command, standalone_mode=False)
            assert [p.name for p in folder.rglob("*") if p.name.endswith(".tmp")] == []
            remount(folder, "size=128m")
            app(command, standalone_mode=False)
    capsys.readouterr()
