"""Killed at random moments, the study continues by the same command."""

from __future__ import annotations

import random
import time

import pytest

from tests.faults.chain import Chain


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.faults)])
def test_after_kills_one_more_start_gives_the_undisturbed_tables(tmp_path, undisturbed, kills):
    draw, wanted, done, number = random.Random(kills), undisturbed.tables(), 0, 0
    while done < kills:
        chain, number = Chain(tmp_path / str(number)), number + 1
        longest = 20.0
        while done < kills:
            before, began = chain.finished(), time.monotonic()
            killed = chain.kill(chain.start(), draw.uniform(0.5, longest))
            assert chain.finished().items() >= before.items()
            if not killed:
                break
            longest, done = max(5.0, time.monotonic() - began), done + 1
        before = chain.finished()
        last = chain.run()
        assert last.returncode == 0, last.stdout + chain.said()
        assert chain.finished().items() >= before.items()
        assert chain.tables() == wanted
        assert chain.left_over() == []
        assert "Nothing to be done" in chain.run().stdout
