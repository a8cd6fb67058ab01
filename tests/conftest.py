"""Shared fixtures: a private working copy of the workflow, and a tiny model in float64."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from costbp.config import load_plan
from costbp.config.study import Plan

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


def working_copy(folder: Path) -> Path:
    """A folder of its own with workflow and configuration, so with its own store and cache."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "config"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "profiles").symlink_to("workflow/profiles")
    return folder


@pytest.fixture(scope="session")
def plan() -> Plan:
    """The default study with its catalog."""
    with contextlib.chdir(ROOT):
        return load_plan()


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Snakefile, workflow and config, made the working directory."""
    working_copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def costbp(workdir: Path) -> Command:
    """Run ``costbp`` in the working copy; returns the finished process."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "costbp", *words],
            cwd=workdir,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


class Lift64(TorchFunctionMode):
    """transformers hard-codes float32 in softmax and normalisation; lift those to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)
