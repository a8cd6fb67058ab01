"""Tables in files: csv, tsv, json, jsonl, parquet and saved data sets, a row at a time, by number."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from costbp.errors import UserError, first_line, suggest
from costbp.tasks.base import POOL, Row

ROWS = 64  # of a parquet file that are in memory at a time
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = (*DELIMITERS, ".json", ".jsonl", ".parquet")
Rows = Iterator[tuple[int, Row]]


class Table(NamedTuple):
    """One split of a source.

    Attributes:
        source: the file or folder.
        unit: what the rows' numbers count: lines as an editor does, or rows.
        columns: their names; without a header their numbers from 1.
        rows: numbers and rows, with the columns asked for, of which the second argument names one
            that is to be read when it's called.
        text: whether all values are text, as a csv's are.
    """

    source: Path
    unit: str
    columns: list[str]
    rows: Callable[[Sequence[str], str | None], Rows]
    text: bool = False


def open_tables(
    path: Path, splits: Mapping[Any, str], header: bool | None = None
) -> dict[str, Table]:
    """Tables by source split: those that are named, or all; one called "" where there are none.

    Args:
        header: whether the first line of a csv or tsv names its columns; None: it does.

    Raises:
        UserError: what is there can't be read, or has no such split.
    """
    found: dict[str, Any] = {p.stem: p for p in sorted(path.glob("*")) if p.suffix in FORMATS}
    if path.is_file():
        found = {POOL: path}
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        found = dict(saved) if isinstance(saved, DatasetDict) else {POOL: saved}
    if not found:
        raise UserError(f"{path} holds no {', '.join(FORMATS)} file and no saved data set")
    if missing := [split for split in splits.values() if split not in found]:
        hint = suggest(missing[0], found) if any(found) else "it has none: leave out data.splits"
        raise UserError(f"{path} has no split '{missing[0]}'; {hint}")
    return {s: _opened(found[s], path, s, header is not False) for s in splits.values() or found}


def _opened(what: Any, path: Path, split: str, header: bool) -> Table:
    if not isinstance(what, Path):
        unit = f"split '{split}', row" if split else "row"
        return Table(path, unit, what.column_names, partial(_selected, what))
    if what.suffix not in FORMATS:
        raise UserError(f"{what}: unknown format; allowed: {', '.join(FORMATS)}")
    if what.suffix == ".parquet":
        table = _mapped(what)
        return Table(what, "row", table.column_names, partial(_selected, table))
    text = what.suffix in DELIMITERS
    rows: Rows = _lines(what, header) if text else _objects(what)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{what} is empty")
    every = itertools.chain([first], rows)
    return Table(what, "line", list(first[1]), lambda wanted, late: every, text)


# --- text ------------------------------------------------------------------------------------------


def _lines(file: Path, header: bool) -> Rows:
    csv.field_size_limit(sys.maxsize)
    text = io.StringIO(_text(file), newline="")
    reader = csv.reader(text, delimiter=DELIMITERS[file.suffix], strict=True)
    names: list[str] = []
    last = 0
    try:
        for cells in reader:
            line, last = last + 1, reader.line_num
            if cells and not names:
                names = cells if header else [str(place + 1) for place in range(len(cells))]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise UserError(f"{file}: two columns are called '{twice[0]}'")
                if header:
                    continue
            if cells and len(cells) != len(names):
                raise UserError(f"{file}, line {line}: has {len(cells)} fields, not {len(names)}")
            if cells:
                yield line, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{file}, line {last + 1}: its quotes aren't balanced ({error}); a field that begins with "
            "a quote ends with one, and quotes within are doubled"
        ) from None


def _objects(file: Path) -> Rows:
    """Objects with their lines or, of an array, their places."""
    text, line = _text(file), 1
    array = file.suffix == ".json" and text.lstrip()[:1] == "["
    try:
        for line, found in enumerate(json.loads(text) if array else text.split("\n"), 1):
            record = found if array else json.loads(found) if found.strip() else None
            if isinstance(record, dict):
                yield line, record
            elif record is not None:
                raise UserError(f"{file}, line {line}: is no object, {{...}}")
    except ValueError as error:
        raise UserError(f"{file}, line {line}: is not JSON ({first_line(error)})") from None


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file, if "
            "it is Latin-1 by `iconv -f latin1 -t utf-8`"
        ) from None


# --- data sets -------------------------------------------------------------------------------------


def _mapped(file: Path) -> Any:
    """A table that leaves nothing behind: mapped from a file that is unlinked at once."""
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        path = f"{scratch}/table.arrow"
        with ParquetFile(file) as source, pa.ipc.new_stream(path, source.schema_arrow) as target:
            for batch in source.iter_batches(ROWS):
                target.write_batch(batch)
        return Dataset.from_file(path)


def _selected(table: Any, wanted: Sequence[str], late: str | None) -> Rows:
    values = table.select_columns([late]).with_format("arrow") if late else None
    for index, row in enumerate(table.select_columns(list(wanted))):
        yield index + 1, row | ({late: partial(_stored, values, index)} if late else {})


def _stored(values: Any, index: int) -> Any:
    """A row's value as its table of one column stores it."""
    return values[index].column(0)[0].as_py()
