"""A disk that is full or read-only: one line, and healed by the next start once there is room."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.chain import FOLDERS

QUICK = ("runs",)  # in the default suite


def _cases() -> list[object]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.faults) for name in FOLDERS
    ]


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own for a folder; skips where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _cases())
def test_a_full_disk_loses_nothing(chain, undisturbed, name):
    needed = sum(p.stat().st_size for p in (undisturbed.folder / name).rglob("*") if p.is_file())
    with disk(chain.folder / name, max(4096, needed // 2)):
        stopped = chain.run()
        said = stopped.stdout + chain.said()
        assert stopped.returncode != 0
        assert re.search("No space left on device|database or disk is full", said), said
        assert "Traceback" not in said, said
        remount(chain.folder / name, "size=512m")
        before = chain.finished()
        again = chain.run()
        assert again.returncode == 0, again.stdout + chain.said()
        assert chain.finished().items() >= before.items()
        assert chain.tables() == undisturbed.tables()
        assert chain.left_over() == []


@pytest.mark.timeout(600)
@pytest.mark.faults
@pytest.mark.parametrize("name", FOLDERS)
def test_a_read_only_folder_is_said_in_a_line(chain, undisturbed, name):
    with disk(chain.folder / name, 2**29):
        remount(chain.folder / name, "ro")
        stopped = chain.run()
        said = stopped.stdout + chain.said()
        assert stopped.returncode != 0
        assert "read-only" in said.lower() and "Traceback" not in said, said
        remount(chain.folder / name, "rw")
        again = chain.run()
        assert again.returncode == 0, again.stdout + chain.said()
        assert chain.tables() == undisturbed.tables()


@pytest.mark.timeout(600)
@pytest.mark.faults
def test_a_clock_set_back_neither_repeats_nor_forgets(finished, undisturbed):
    """Files are then of the future; a seed added later is run, and once."""
    tomorrow = 24 * 3600
    for path in [*finished.files(), *(finished.folder / ".snakemake").rglob("*")]:
        facts = path.stat()
        os.utime(path, (facts.st_atime + tomorrow, facts.st_mtime + tomorrow))
    before = finished.finished()
    assert "Nothing to be done" in finished.run().stdout
    more = finished.run("--config", "seeds=[0,1,2]")
    assert more.returncode == 0, more.stdout + finished.said()
    assert finished.finished().items() >= before.items() and len(finished.finished()) == 12
