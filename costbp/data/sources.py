"""Rows of a task from where the catalog says: an asset, a hub's data set, files, or the task itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from costbp.config.catalog import AssetData, HubData, LocalData, TaskEntry
from costbp.errors import UserError, first_line, suggest
from costbp.tasks.base import POOL, Example, Row, Task, load_task

IMAGE = "image"  # the column of that name, which is read when it's asked for
ROWS = 64  # of a parquet file that are in memory at a time
FORMATS = (".csv", ".json", ".jsonl", ".parquet")


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
        except Exception as error:  # a row that isn't as it should be, or a mistake in a file
            where = f"row {counts[split]}" + (f" of split '{split}'" if split else "")
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__} "
            raise UserError(f"task '{name}', {where}: {kind}{first_line(error)}") from error
        if example.text.strip() or example.image is not None:
            found.setdefault(split, []).append(example)
    named = task.data.splits.values() if isinstance(task.data, HubData | LocalData) else ()
    empty = [f"split '{split}' of its" for split in named if not found.get(split)]
    if empty or not found:
        raise UserError(f"task '{name}': {empty[0] if empty else 'its'} source is empty")
    return found


def _rows(task: TaskEntry, name: str, definition: Task, assets: Path) -> Iterator[tuple[str, Row]]:
    data = task.data
    if isinstance(data, HubData | LocalData):
        path = assets / data.folder if isinstance(data, HubData) else Path(data.path)
        yield from _saved(data, name, definition, path)
    elif definition.rows is None:
        module = task.loader if isinstance(task.loader, str) else task.loader.file
        raise UserError(
            f"task '{name}': its module '{module}' has no rows of its own; the catalog's "
            "tasks.yaml must say where they are (data: {kind: hub, ...} or {kind: local, ...})"
        )
    else:
        folder = assets / data.asset if isinstance(data, AssetData) else assets
        if isinstance(data, AssetData) and not folder.is_dir():
            raise UserError(
                f"task '{name}': asset '{data.asset}' is not in {assets}; run `costbp assets`"
            )
        try:
            yield from definition.rows(folder)
        except OSError as error:
            raise UserError(
                f"task '{name}': its rows can't be read from {folder} ({error.strerror}); run "
                "`costbp assets`, or say where they are (data in tasks.yaml)"
            ) from error


def _saved(
    data: HubData | LocalData, name: str, task: Task, path: Path
) -> Iterator[tuple[str, Row]]:
    for split, table in _tables(data, name, path).items():
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
            cell = {IMAGE: partial(_image, images, index)} if image else {}
            yield split, {column: row[theirs] for column, theirs in columns.items()} | cell


def _tables(data: HubData | LocalData, name: str, path: Path) -> dict[str, Any]:
    """``datasets.Dataset`` by source split: those that the entry names, or one called ""."""
    if not path.exists():
        hint = "run `costbp assets`" if isinstance(data, HubData) else "check data.path"
        raise UserError(f"task '{name}': {path} is not there; {hint}")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return _open(path, data.splits)
    except UserError as error:
        raise UserError(f"task '{name}': {error}") from None
    except Exception as error:
        raise UserError(f"task '{name}': {path} can't be read ({first_line(error)})") from error


def _open(path: Path, splits: Mapping[Any, str]) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict, load_from_disk

    found: dict[str, Any] = {p.stem: p for p in sorted(path.glob("*")) if p.suffix in FORMATS}
    if path.is_file():
        found = {POOL: path}
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        saved = load_from_disk(str(path))
        found = dict(saved) if isinstance(saved, DatasetDict) else {POOL: saved}
    if not found:
        raise UserError(f"{path} holds no {', '.join(FORMATS)} file and no saved data set")
    if missing := [split for split in splits.values() if split not in found]:
        hint = suggest(missing[0], found) if any(found) else "it has none: leave out data.splits"
        raise UserError(f"{path} has no split '{missing[0]}'; {hint}")
    kept = {split: found[split] for split in splits.values() or found}
    return {s: _load(t, Dataset) if isinstance(t, Path) else t for s, t in kept.items()}


def _load(file: Path, dataset: Any) -> Any:
    """A table that leaves nothing behind: in memory or, of parquet, which may hold images, mapped
    from a file that is unlinked at once."""
    import pandas as pd

    if file.suffix == ".parquet":
        return _mapped(file, dataset)
    if file.suffix == ".csv":
        frame = pd.read_csv(file, keep_default_na=False)
    elif file.suffix in FORMATS:
        lines = file.suffix == ".jsonl" or file.read_bytes()[:1] != b"["
        frame = pd.read_json(file, lines=lines, dtype=False, convert_dates=False)
    else:
        raise UserError(f"{file}: unknown format; allowed: {', '.join(FORMATS)}")
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


def _image(images: Any, index: int) -> Any:
    """A row's image as its table of one column stores it."""
    return images[index].column(0)[0].as_py()
