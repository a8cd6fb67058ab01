"""Rows of a task from where the catalog says: an asset, a hub's data set, files, or the task itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from costbp.config.catalog import AssetData, Column, HubData, LocalData, TaskEntry
from costbp.config.loaders import Classification
from costbp.data.tables import Table, open_tables
from costbp.errors import UserError, first_line, suggest
from costbp.tasks.base import Example, Row, Task, load_task

IMAGE = "image"  # the column of that name, which is read when it's asked for
MOST = 20  # columns that are named where one is missing
Asked = Column | tuple[Column, ...]


class Found(NamedTuple):
    """Examples by the source's own split (one called "" where it has none), and how many rows had no
    text and were left out."""

    examples: dict[str, list[Example]]
    empty: int


def read_examples(task: TaskEntry, name: str, assets: Path) -> Found:
    """What a task's source holds.

    Args:
        assets: folder that holds what was fetched, one folder each.

    Raises:
        UserError: the source is missing, empty, or lacks a split or column; a label is outside
            the task's set. Names the task, and the row.
    """
    try:
        return _read(task, load_task(task.loader), assets)
    except UserError as error:
        raise UserError(f"task '{name}': {error}") from error


def _read(task: TaskEntry, definition: Task, assets: Path) -> Found:
    found: dict[str, list[Example]] = {}
    empty, lowest = 0, dict[str, int]()  # of columns that hold whole numbers alone; else -1
    for split, place, row in _rows(task, definition, assets):
        for column, value in row.items():
            lowest[column] = min(lowest.get(column, value), value) if type(value) is int else -1
        try:
            example = definition.example(row)
        except Exception as error:  # a row that isn't as it should be, or a mistake in a file
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__} "
            raise UserError(f"{place}: {kind}{first_line(error)}") from error
        if example.text.strip() or example.image is not None:
            found.setdefault(split, []).append(example)
        else:
            empty += 1
    given = task.data if isinstance(task.data, HubData | LocalData) else None
    splits = given.splits.values() if given else ()
    missing = [f"split '{split}' of its" for split in splits if not found.get(split)]
    if missing or not found:
        raise UserError(f"{missing[0] if missing else 'its'} source is empty")
    shipped = given and definition.names and isinstance(task.loader, str)
    if shipped and max(lowest.values()) > 0:
        raise UserError(
            f"its source's labels are numbers from {max(lowest.values())}, and '{task.loader}' takes 0 "
            f"for {definition.names[0]}; say what they mean (loader: {{kind: classification, labels: ...}})"
        )
    for split, examples in found.items() if isinstance(task.loader, Classification) else ():
        if len(answers := {example.answer for example in examples}) == 1:
            where = f"split '{split}' of its source" if split else "its source"
            raise UserError(f"{where} has one class alone, {answers.pop()}")
    return Found(found, empty)


def _rows(task: TaskEntry, definition: Task, assets: Path) -> Iterator[tuple[str, str, Row]]:
    """Source split, place and content of each row."""
    data = task.data
    if isinstance(data, HubData | LocalData):
        yield from _saved(task, data, definition, assets)
    elif definition.rows is None:
        module = task.loader if isinstance(task.loader, str) else getattr(task.loader, "file", "")
        raise UserError(
            f"its module '{module}' has no rows of its own; the catalog's tasks.yaml must say where "
            "they are (data: {kind: hub, ...} or {kind: local, ...})"
        )
    else:
        folder = assets / data.asset if isinstance(data, AssetData) else assets
        if isinstance(data, AssetData) and not folder.is_dir():
            raise UserError(f"asset '{data.asset}' is not in {assets}; run `costbp assets`")
        try:
            for number, (split, row) in enumerate(definition.rows(folder), 1):
                yield split, f"row {number}", row
        except OSError as error:
            raise UserError(
                f"its rows can't be read from {folder} ({error.strerror}); run `costbp assets`, or say "
                "where they are (data in tasks.yaml)"
            ) from error


def _saved(
    task: TaskEntry, data: HubData | LocalData, definition: Task, assets: Path
) -> Iterator[tuple[str, str, Row]]:
    for split, table in _tables(data, assets).items():
        columns = {c: _columns(c, data.columns.get(c, c), table) for c in definition.columns}
        late = next(iter(columns.get(IMAGE, ())), None)
        wanted = dict.fromkeys(c for given in columns.values() for c in given if c != late)
        read = _typed if table.text and not isinstance(task.loader, Classification) else None
        for number, row in table.rows(list(wanted), late):
            place = f"{table.source}, {table.unit} {number}"
            if missing := [name for name in wanted if name not in row]:
                raise UserError(f"{place}: has no '{missing[0]}'")
            values = {name: read(row[name]) for name in wanted} if read else row
            yield split, place, {c: _joined(columns[c], values) for c in columns}


def _tables(data: HubData | LocalData, assets: Path) -> dict[str, Table]:
    path = assets / data.folder if isinstance(data, HubData) else Path(data.path)
    if not path.exists():
        hint = "run `costbp assets`" if isinstance(data, HubData) else "check data.path"
        raise UserError(f"{path} is not there; {hint}")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return open_tables(path, data.splits, getattr(data, "header", None))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from error


def _columns(column: str, asked: Asked, table: Table) -> list[str]:
    """Names of the columns that stand for one of the task's.

    Raises:
        UserError: there is none of that name or number.
    """
    found = []
    for one in asked if isinstance(asked, tuple) else (asked,):
        known = isinstance(one, int) and one <= len(table.columns)
        name = table.columns[int(one) - 1] if known else str(one)
        if name not in table.columns:
            allowed = suggest(name, (column[:40] for column in table.columns[:MOST]))
            raise UserError(
                f"{table.source} has no column '{name}' for '{column}'; {allowed} (map it under "
                "data.columns; header: false gives numbers)"
            )
        found.append(name)
    return found


def _joined(columns: list[str], row: Row) -> Any:
    values = [row[column] for column in columns]
    return values[0] if len(values) == 1 else " ".join(str(v) for v in values if v is not None)


def _typed(cell: str) -> Any:
    """What a csv's text spells, where that is spelt so again: a number, a truth value, or itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if str(value := kind(cell)) == cell and cell[-1].isdigit():
                return value
    return {"True": True, "False": False}.get(cell, cell)
