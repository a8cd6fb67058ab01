"""What doctor says of GPUs, and its checks of a device, on the one device there is."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from costbp.cli import app, doctor
from costbp.config import load_plan
from costbp.errors import UserError
from costbp.estimators import memory_plans
from costbp.train import selftest
from costbp.train.selftest import Check, checks

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "toolkit", lambda: "13.0")


def smi(answer, code=0):
    return lambda *args, **kwargs: SimpleNamespace(stdout=answer, returncode=code)


def test_a_driver_too_old_is_named_beside_the_toolkit(workdir, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", smi("535.104.05\n535.104.05\n"))
    found = doctor.gpu(load_plan([Path("config/studies/gpu-demo.yaml")]))
    assert found.state == "missing"
    assert "driver 535.104.05, torch's CUDA 13.0" in found.remark
    assert "PyTorch's installation selector" in found.remark
    with pytest.raises(UserError, match=r"--device cuda: .*driver 535"):
        app(["doctor", "--device", "cuda"], standalone_mode=False)


@pytest.mark.parametrize("answer", [smi("", 9), smi("NVIDIA-SMI has failed", 1)])
def test_without_a_driver_it_says_so(workdir, no_gpu, monkeypatch, answer):
    monkeypatch.setattr(subprocess, "run", answer)
    assert "no NVIDIA driver answers (torch's CUDA: 13.0)" in doctor.no_cuda()
    assert doctor.gpu(load_plan()).state == "note"  # a study that needs none


def test_an_unknown_device_is_one_line(workdir):
    with pytest.raises(UserError, match="--device gpu: allowed: cuda, cpu"):
        app(["doctor", "--device", "gpu"], standalone_mode=False)


def test_the_checks_of_a_device_are_shown_and_written(workdir, monkeypatch, capsys):
    few = {k: v for k, v in load_plan().catalog.methods.items() if k in ("zo_vanilla", "zo_svrg")}
    monkeypatch.setattr(
        "costbp.train.selftest.checks", lambda device, methods: selftest_of(device, few)
    )
    app(["doctor", "--device", "cpu", "--out", "out/found.json"], standalone_mode=False)
    found = json.loads(Path("out/found.json").read_text())
    assert found["about"]["device"] == "cpu" and found["about"]["torch"] == torch.__version__
    states = {check["what"]: check["state"] for check in found["checks"]}
    assert states.pop("two jobs, one device") == "skipped"
    assert len(states) == 5 and set(states.values()) == {"ok"}
    bits = next(c for c in found["checks"] if c["what"] == "methods in 4 bits")
    assert set(bits["figures"]["relative_error"]) == set(few)
    assert "out/found.json" in capsys.readouterr().out


def selftest_of(device, methods):
    """Without the check of bytes, whose four methods aren't among these."""
    return (c for c in checks_of(device, methods) if c.what != "predicted bytes")


checks_of = checks


def test_every_method_agrees_with_itself_and_a_wrong_device_is_seen(workdir, monkeypatch):
    """A device whose directional derivatives are a tenth too large fails, and is named."""
    methods = {k: v for k, v in load_plan().catalog.methods.items() if k.startswith("fmad_v")}
    assert selftest._methods(CPU, methods, "float32").state == "ok"
    plain, calls = selftest._gradients, []

    def wrong(entry, method, device, eps):
        found, settled = plain(entry, method, device, eps)
        calls.append(1)
        return ([1.1 * g for g in found] if len(calls) % 2 == 0 else found), settled

    monkeypatch.setattr(selftest, "_gradients", wrong)
    found = selftest._methods(CPU, methods, "float32")
    assert found.state == "failed" and "too far: fmad_vanilla" in found.remark


def test_masks_that_differ_are_seen(monkeypatch):
    assert selftest._masks(CPU).state == "ok"
    fresh = functools.partial(memory_plans.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(memory_plans, "checkpoint", fresh)
    assert selftest._masks(CPU).state == "failed"


def test_a_check_that_breaks_is_a_failed_one(monkeypatch, workdir):
    def broken(device):
        raise RuntimeError("no kernel image is available\nmore")

    for name in ("_masks", "_no_room", "_two_jobs"):
        monkeypatch.setattr(selftest, name, broken)
    found = [c for c in checks(CPU, {}) if c.state == "failed" and "kernel image" in c.remark]
    assert len(found) == 3 and "more" not in found[0].remark
    text = selftest.as_json([Check("a", "ok", "b", {"c": 1})], {"device": "d"})
    assert json.loads(text)["checks"][0]["figures"] == {"c": 1}


def test_memory_is_told_by_model_and_shape(workdir, capsys, monkeypatch):
    monkeypatch.setattr(
        "costbp.cost.pairs.traced_cost",
        lambda plan, model, task, method: (
            SimpleNamespace(bytes=3 * 2**29) if "demo" in plan.name else None
        ),
    )
    with pytest.raises(UserError):  # there is no GPU and nothing fetched
        monkeypatch.setattr(doctor, "to_fetch", lambda plan: {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        app(["doctor", "--memory", "-c", "config/studies/gpu-demo.yaml"], standalone_mode=False)
    out = capsys.readouterr().out.replace("\n", " ")
    assert "40 x 64" in out and "6 x 256" in out and "fmad_vanilla 1.50" in out
