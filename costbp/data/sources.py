"""Rows of a task from where the catalog says: an asset, a hub's data set, files, or the task itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from costbp.config.catalog import AssetData, HubData, LocalData, TaskEntry
from costbp.errors import UserError, suggest
from costbp.tasks.base import POOL, Example, Row, Task, load_task

IMAGE = "image"  # the column of that name, which is read when it's asked for
ROWS = 64  # of a parquet file that are in memory at a time
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_examples(task: TaskEntry, name: str, assets: Path) -> dict[str, list[Example]]:
    """Examples by the source's own split (one called "" where it has none).

    Args:
        assets: folder that holds what was fetched, one folder each.

    Raises:
        UserError: the source is missing, empty, or lacks a split or column; a label is outside
            the task's set. Names the task, and the row.
    """
    definition = load_task(task.loader)
    found: dict[str, list[Example]] = {}
    counts: dict[str, int] = {}
    for split, row in _rows(task, name, definition, assets):
        counts[split] = counts.get(split, 0) + 1
        try:
            example = definition.example(row)
        except UserError as error:
            where = f"row {counts[split]}" + (f" of split '{split}'" if split else "")
            raise UserError(f"task '{name}', {where}: {error}") from None
        if example.text.strip() or example.image is not None:
            found.setdefault(split, []).append(example)
    empty = [split for split in _splits(task).values() if not found.get(split)]
    if empty or not found:
        raise UserError(
            f"task '{name}': "
            + (f"split '{empty[0]}' of its source is empty" if empty else "its source is empty")
        )
    return found


def _splits(task: TaskEntry) -> Mapping[str, str]:
    if isinstance(task.data, HubData | LocalData):
        return {str(ours): theirs for ours, theirs in task.data.splits.items()}
    return {}


def _rows(task: TaskEntry, name: str, definition: Task, assets: Path) -> Iterator[tuple[str, Row]]:
    data = task.data
    if isinstance(data, HubData):
        yield from _saved(data, name, definition, assets / data.folder)
    elif isinstance(data, LocalData):
        yield from _saved(data, name, definition, Path(data.path))
    elif definition.rows is None:
        raise UserError(
            f"task '{name}': its module '{task.loader}' has no rows of its own; the catalog's "
            "tasks.yaml must say where they are (data: {kind: hub, ...} or {kind: local, ...})"
        )
    else:
        folder = assets / data.asset if isinstance(data, AssetData) else assets
        if isinstance(data, AssetData) and not folder.is_dir():
            raise UserError(
                f"task '{name}': asset '{data.asset}' is not in {assets}; run `costbp assets`"
            )
        yield from definition.rows(folder)


def _saved(
    data: HubData | LocalData, name: str, task: Task, path: Path
) -> Iterator[tuple[str, Row]]:
    tables = open_tables(data, name, path)
    for split, table in tables.items():
        columns = {column: data.columns.get(column, column) for column in task.columns}
        for column, theirs in columns.items():
            if theirs not in table.column_names:
                raise UserError(
                    f"task '{name}': {path} has no column '{theirs}' for '{column}'; "
                    f"{suggest(theirs, table.column_names)} (map it under data.columns)"
                )
        image = columns.pop(IMAGE, None)
        images = table.select_columns([image]).with_format("arrow") if image else None
        for index, row in enumerate(table.select_columns(list(columns.values()))):
            cell = {IMAGE: partial(_cell, images, index)} if image else {}
            yield split, {column: row[theirs] for column, theirs in columns.items()} | cell


def open_tables(data: HubData | LocalData, name: str, path: Path) -> dict[str, Any]:
    """``datasets.Dataset`` by source split: those that the entry names, or one called "".

    Raises:
        UserError: nothing readable is there, or a split is missing.
    """
    if not path.exists():
        hint = "run `costbp assets`" if isinstance(data, HubData) else "check data.path"
        raise UserError(f"task '{name}': {path} is not there; {hint}")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        whole = _open(path, data.splits)
    except UserError as error:
        raise UserError(f"task '{name}': {error}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"task '{name}': {path} can't be read ({reason})") from error
    wanted = dict.fromkeys(data.splits.values()) or dict.fromkeys(whole)
    return {split: whole[split] for split in wanted}


def _open(path: Path, splits: Mapping[Any, str]) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict, load_from_disk

    if path.is_file():
        files = {POOL: path}
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        saved = load_from_disk(str(path))
        tables = dict(saved) if isinstance(saved, DatasetDict) else {POOL: saved}
        _has(tables, splits, path)
        return tables
    else:
        files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in FORMATS}
    if not files:
        raise UserError(f"{path} holds no {', '.join(FORMATS)} file and no saved data set")
    _has(files, splits, path)
    tables = {}
    for split, file in files.items():
        if splits and split not in splits.values() and split != POOL:
            continue
        if file.suffix not in FORMATS:
            raise UserError(f"{file}: unknown format; allowed: {', '.join(FORMATS)}")
        tables[split] = _load(FORMATS[file.suffix], file, Dataset)
    return tables


def _has(found: Mapping[str, Any], splits: Mapping[Any, str], path: Path) -> None:
    if missing := [split for split in splits.values() if split not in found]:
        hint = suggest(missing[0], found) if any(found) else "it has none: leave out data.splits"
        raise UserError(f"{path} has no split '{missing[0]}'; {hint}")


def _load(kind: str, file: Path, dataset: Any) -> Any:
    """A table that leaves nothing behind: in memory or, of parquet, which may hold images, mapped
    from a file that is unlinked at once."""
    import pandas as pd

    if kind == "parquet":
        return _mapped(file, dataset)
    lines = file.suffix == ".jsonl" or (kind == "json" and file.read_bytes()[:1] != b"[")
    frame = (
        pd.read_csv(file, keep_default_na=False)
        if kind == "csv"
        else pd.read_json(file, lines=lines, dtype=False, convert_dates=False)
    )
    return dataset.from_pandas(frame, preserve_index=False)


def _mapped(file: Path, dataset: Any) -> Any:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        path = f"{scratch}/table.arrow"
        with ParquetFile(file) as source, pa.ipc.new_stream(path, source.schema_arrow) as target:
            for batch in source.iter_batches(ROWS):
                target.write_batch(batch)
        return dataset.from_file(path)


def _cell(images: Any, index: int) -> Any:
    """A row's image as its table of one column stores it."""
    return images[index].column(0)[0].as_py()
