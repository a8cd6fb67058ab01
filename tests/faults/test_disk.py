"""A disk that is full or read-only: one line, and healed by the next start once there is room."""

from __future__ import annotations

import os
import re

import pytest

from tests.disks import disk, remount
from tests.faults.chain import FOLDERS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", FOLDERS)
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
