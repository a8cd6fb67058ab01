"""Which GPU a job takes, on machines that are pretended: no two jobs ever share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from costbp.device_pool import LOCKS, device_slot, visible
from costbp.errors import UserError
from tests.conftest import ROOT

MACHINE = ["aa", "bb", "cc", "dd"]  # UUIDs of its GPUs, by the driver's numbers


class Driver:
    """What torch.cuda says on a machine with four GPUs, one of them with a part (MIG) in its name."""

    def __init__(self) -> None:
        self.current = None

    def names(self):
        tokens = os.environ.get("CUDA_VISIBLE_DEVICES")
        if tokens is None:
            return MACHINE
        found = []
        for token in tokens.split(","):
            if token.isdigit():
                found.append(MACHINE[int(token)])
            elif token.startswith("MIG-"):
                found.append("dd")  # all parts of a device may tell the device's own UUID
            else:
                found += [name for name in MACHINE if name.startswith(token.removeprefix("GPU-"))]
        return found

    def device_count(self):
        return len(self.names())

    def get_device_properties(self, index):
        return SimpleNamespace(uuid=self.names()[index], total_memory=2**34)

    def set_device(self, index):
        self.current = index

    def install(self, patch) -> None:
        for name in ("device_count", "get_device_properties", "set_device"):
            patch.setattr(torch.cuda, name, getattr(self, name))


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    driver.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (None, MACHINE),
        ("0", ["aa"]),
        ("2,3", ["cc", "dd"]),
        ("3,0", ["dd", "aa"]),
        ("GPU-b", ["bb"]),  # an abbreviation is the same device as its number
        ("MIG-one,MIG-two", ["MIG-one", "MIG-two"]),
    ],
)
def test_devices_are_known_by_their_id(driver, monkeypatch, setting, names):
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert visible() == names


def test_a_slot_is_a_free_device_and_the_current_one(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with device_slot("auto", tmp_path) as first:
        assert first == torch.device("cuda", 0) and driver.current == 0
        with device_slot("cuda", tmp_path) as second:
            assert second == torch.device("cuda", 1) and driver.current == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")  # the same two, the other way round
    with device_slot("auto", tmp_path), device_slot("auto", tmp_path) as other:
        assert other == torch.device("cuda", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tmp_path):
    with pytest.raises(UserError, match="no CUDA device"), device_slot("cuda", tmp_path):
        pass
    with device_slot("auto", tmp_path) as device:
        assert device.type == "cpu"


def test_locks_lie_in_one_place_a_machine(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/somewhere/else")
    assert str(LOCKS) == f"/tmp/costbp-gpus-{os.getuid()}"


JOB = """
import json, sys, time, pytest, torch
from pathlib import Path
from costbp.device_pool import device_slot, visible
from tests.test_devices import Driver
Driver().install(pytest.MonkeyPatch())
with device_slot("auto", Path(sys.argv[1])) as device:
    start = time.monotonic()
    time.sleep(0.4)
    print(json.dumps([visible()[device.index], start, time.monotonic()]))
"""


def test_jobs_under_different_settings_never_share_a_device(tmp_path):
    """Six processes that see overlapping parts of one machine, as two schedulers and a user would."""
    settings = ("0", "0", "0,1", "1,0", "GPU-a", "1")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": setting},
            stdout=subprocess.PIPE,
            text=True,
        )
        for setting in settings
    ]
    deadline = time.monotonic() + 120
    held = defaultdict(list)
    for job in jobs:
        name, start, end = json.loads(job.communicate(timeout=deadline - time.monotonic())[0])
        held[name].append((start, end))
    assert sum(map(len, held.values())) == len(settings) and set(held) <= {"aa", "bb"}
    for spans in held.values():
        for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert end <= start
