"""Small file operations that every stage shares: atomic writes, checksums, advisory locks.

What later stages read is sealed: its digest stands beside it, ``.NAME.sha256``, in the form of
``sha256sum``. A file without a seal counts as sound, so what older versions wrote stays valid.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from costbp.errors import UserError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = (  # by writers that raise an error of their own kind: torch, safetensors, SQLite
    *(
        "PytorchStreamWriter",
        "inline_container.cc",
        "iostream error",
        "I/O error",
        "No space left",
        "File too large",
    ),
    "database or disk is full",
)

T = TypeVar("T")
READ_WHOLE = 2**28  # bytes; of more, sizes (and of folders times) are read, not contents


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
    """Write ``value`` as indented JSON, sealed. Non-finite floats are refused."""
    with sealed(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", "utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal_of(path: Path) -> Path:
    """Where the seal of a file stands."""
    return path.with_name(f".{path.name}.sha256")


@contextlib.contextmanager
def sealed(path: Path, *beside: Path) -> Iterator[Path]:
    """``atomic``, with a seal on what is written and on what has been written ``beside`` it."""
    with atomic(path) as temporary:
        yield temporary
        files = {path.name: temporary} | {file.name: file for file in beside}
        write_text(seal_of(path), "".join(f"{_mark(f)}  {name}\n" for name, f in files.items()))


def _mark(path: Path) -> str:
    size = path.stat().st_size
    return sha256(path) if size <= READ_WHOLE else f"size={size}"


def intact(path: Path) -> bool:
    """Whether a file is there and it, and what was sealed with it, is as it was written."""
    try:
        lines = seal_of(path).read_text("utf-8").splitlines()
        marks = [line.split("  ", 1) for line in lines]
        return path.exists() and all(_mark(path.with_name(name)) == mark for mark, name in marks)
    except (OSError, ValueError):
        return path.exists() and not seal_of(path).exists()


def read_cached(path: Path, parse: Callable[[bytes], T]) -> T | None:
    """What a cache holds; None where it holds nothing, or, with a warning, something damaged."""
    if not path.exists():
        return None
    try:
        if intact(path):
            return parse(path.read_bytes())
    except (OSError, ValueError):
        pass
    print(f"warning: {path} is damaged; it is made anew", file=sys.stderr, flush=True)
    return None


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
