"""Finished runs of other stores, copied into the study's own. What a foreign store says of itself is
checked, never trusted: its names, its paths, its hashes."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from costbp.config.study import Cell, Plan
from costbp.console import say
from costbp.errors import UserError, first_line
from costbp.files import atomic, ensure_folder, lock, seal_of, sealed
from costbp.train.record import CHECKPOINT, COLUMNS, PROGRESS, RECORD, STEPS, Record, read_record

LEVELS = (*Cell._fields, "seed")  # of folders in a store
LARGEST = 2**28  # bytes of a file of a run
# A second run of a spec differs in these.
TIMES = {
    *("seconds", "evaluation_seconds", "counting_seconds", "step_seconds", "forward_seconds"),
    *("rss_bytes", "allocated_bytes", "reserved_bytes", "resumed"),
}


class Refused(Exception):
    """Why a run isn't taken."""


def merge(plan: Plan, stores: list[Path]) -> Counter[str]:
    """Copy finished runs of ``stores`` into the study's; what is refused is said, a line each.

    Returns:
        how many were merged, are here already, were refused.

    Raises:
        UserError: a store isn't a folder, or is the study's own.
    """
    own = ensure_folder(plan.study.paths.store)
    for store in stores:
        if not store.is_dir():
            raise UserError(f"{store}: is not a folder of runs")
        if store.resolve() == own.resolve():
            raise UserError(f"{store}: is this study's own store")
    counts = Counter({"merged": 0, "here already": 0, "refused": 0})
    strange: dict[str, None] = {}
    for store in stores:
        for folder in folders(store):
            try:
                record, files = examine(store, folder)
                counts[_take(own / folder.relative_to(store), record, files)] += 1
            except Refused as why:
                counts["refused"] += 1
                say(f"refused: {str(folder)!r}: {why}")
            else:
                if record.spec.cell[2] not in plan.catalog.methods:
                    strange[record.spec.cell[2]] = None
    if strange:
        say(
            f"runs of methods that {plan.study.catalog}/methods.yaml doesn't have: "
            f"{', '.join(map(repr, strange))}; reports show them once their entries are there"
        )
    return counts


def folders(store: Path, level: int = 0) -> Iterator[Path]:
    """What could be a run's folder; and links at any level, which nothing follows."""
    with os.scandir(store) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() or (level == len(LEVELS) - 1 and entry.is_dir(follow_symlinks=False)):
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            yield from folders(Path(entry.path), level + 1)


def examine(store: Path, folder: Path) -> tuple[Record, dict[str, bytes]]:
    """A foreign run's record and the content of its files.

    Raises:
        Refused: it isn't a finished, undamaged run of the spec that names it.
    """
    if folder.is_symlink():
        raise Refused("is a symbolic link")
    files = {name: _content(folder / name) for name in (STEPS, RECORD)}
    try:
        record = Record.model_validate_json(files[RECORD])
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, found["loc"]))
        raise Refused(
            f"{RECORD} is damaged, or of another version: {where}: {found['msg']}"
        ) from None
    try:
        steps = pq.read_table(io.BytesIO(files[STEPS]))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Refused(f"{STEPS} is damaged: {first_line(error)}") from None
    if not steps.schema.equals(COLUMNS):
        raise Refused(f"{STEPS} has other columns than {', '.join(COLUMNS.names)}")
    if record.outcome == "failed":
        raise Refused("the run failed")
    if record.hash != record.spec.hash:
        raise Refused(
            f"its hash is {record.hash}, and that of its spec {record.spec.hash}: it was changed, "
            "or made by another version of this package or of a Python file"
        )
    names = (*record.spec.cell, f"seed={record.spec.seed}-{record.hash}")
    if folder.relative_to(store).parts != names:
        raise Refused(f"its record is of {'/'.join(names)!r}")
    if (seal := seal_of(folder / RECORD)).exists():
        lines = _content(seal).decode("utf-8", "replace").splitlines()
        marks = {f"{hashlib.sha256(content).hexdigest()}  {n}" for n, content in files.items()}
        if marks != set(lines):
            raise Refused("it has changed since it was written")
    return record, files


def _content(path: Path) -> bytes:
    """A plain file's content, whatever its name is made to lead to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
                raise Refused(f"{path.name} is no plain file, or too large")
            return stream.read(LARGEST)
    except OSError as error:
        kind = "is a symbolic link" if path.is_symlink() else error.strerror
        raise Refused(f"{path.name}: {kind}") from None


def _take(folder: Path, record: Record, files: dict[str, bytes]) -> str:
    """Put a run into its folder, the record last; or find that it is there."""
    with lock(folder / ".lock", wait=False) as free:
        if not free:
            raise Refused("it is being run here")
        try:
            here = read_record(folder)
        except ValueError:
            here = None  # damaged: it would be computed again
        if here is not None and here.outcome != "failed":
            if _figures(here) != _figures(record):
                raise Refused(f"{folder} has other figures or another outcome; both are kept")
            return "here already"
        with atomic(folder / STEPS) as temporary:
            temporary.write_bytes(files[STEPS])
        with sealed(folder / RECORD, folder / STEPS) as temporary:
            temporary.write_bytes(files[RECORD])
        for name in (CHECKPOINT, PROGRESS):
            (folder / name).unlink(missing_ok=True)
    return "merged"


def _figures(record: Record) -> tuple[str, dict[str, object]]:
    """What two runs of a spec agree in."""
    return record.outcome, record.summary.model_dump(exclude=TIMES)
