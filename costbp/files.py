"""Small file operations that every stage shares: atomic writes, checksums, advisory locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from costbp.errors import UserError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = (  # by writers that raise an error of their own kind: torch, safetensors, SQLite
    *("PytorchStreamWriter", "inline_container.cc", "I/O error", "No space left", "File too large"),
    "database or disk is full",
)


def ensure_folder(path: Path) -> Path:
    """Create ``path`` and its parents; a refusal becomes a one-line error.

    Raises:
        UserError: the folder can't be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {unwritten(error, path)}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: the folder is read-only")
    return path


def unwritten(error: BaseException, folder: Path) -> str | None:
    """Why something could not be written to ``folder``, in one line, whichever library says it; None
    where the error is of another kind."""
    text = first_line(error)
    told = any(words in text for words in SAID)
    if not (told or isinstance(error, OSError)):
        return None
    why = getattr(error, "strerror", None) or text
    if not (told or getattr(error, "errno", None) in FULL):
        return why
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f"{why}; {shutil.disk_usage(there).free / 2**20:.1f} MiB are free in {folder}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of writing ``path`` become a one-line error.

    Raises:
        UserError: it can't be written.
    """
    try:
        yield
    except Exception as error:
        why = None if isinstance(error, UserError) else unwritten(error, path.parent)
        if why is None:
            raise
        raise UserError(f"cannot write {path}: {why}") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of ``path`` that takes its name only if the block succeeds."""
    ensure_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by atomic rename."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON by atomic rename. Non-finite floats are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


READ_WHOLE = 2**28  # bytes; of larger folders sizes and times are read, not contents


@functools.cache
def digest(path: Path) -> str:
    """Hex digest of a file or folder: of names and contents or, above 256 MiB, of names, sizes and
    times of change. "missing" where nothing is there."""
    if not path.exists():
        return "missing"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    whole = sum(file.stat().st_size for file in files) <= READ_WHOLE
    found = hashlib.sha256()
    for file in files:
        facts = file.stat()
        content = sha256(file) if whole else f"{facts.st_size} {facts.st_mtime_ns}"
        found.update(f"{file.relative_to(path)} {content}\n".encode())
    return found.hexdigest()


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive advisory lock on ``path``; the kernel drops it when the process ends.

    Yields True when the lock is held, False when ``wait`` is off and somebody else has it.
    """
    ensure_folder(path.parent)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
