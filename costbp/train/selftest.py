"""What `costbp doctor --device` runs: every method on a device against the CPU, recomputed masks,
predicted against allocated bytes, running out of memory, two jobs on one device. Random weights."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from costbp.config.catalog import ModelEntry
from costbp.config.methods import MethodEntry
from costbp.config.sources import ConfigSource
from costbp.config.trainables import LoraTraining
from costbp.cost.bench import Bench
from costbp.device import free, out_of_memory
from costbp.estimators.memory_plans import PLANS
from costbp.estimators.probe import settle
from costbp.estimators.update import update
from costbp.models.architecture import sample_batch, transformers_config
from costbp.models.build import build_from_config
from costbp.objective import Batch, Key, Objective

STEPS = 3
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits": {"dtype": "bfloat16", "bits": 4, "group": 16},
}
CLOSE = {"float32": 1e-3, "bfloat16": 0.1, "4 bits": 0.1}  # relative, of the gradient estimates
NOISY = 1.0  # the same of differences that a base in half precision rounds
PREDICTED = 0.05  # of the allocator's bytes
SMALL = (64, 3, 4, 256)  # hidden size, layers, heads, vocabulary
LARGE = (2048, 16, 32, 128256)  # 1.5 G weights


@dataclass
class Check:
    """One thing that was tried: ``ok``, ``failed`` or ``skipped``, and its figures."""

    what: str
    state: str
    remark: str
    figures: dict[str, Any] = field(default_factory=dict)


def checks(device: torch.device, methods: Mapping[str, MethodEntry]) -> Iterator[Check]:
    """All checks, one after the other; one that breaks is a failed one."""
    for precision in PRECISIONS:
        what = f"methods in {precision}"
        yield from _tried(what, partial(_methods, device, methods, precision))
    yield from _tried("recomputed dropout masks", lambda: _masks(device))
    yield from _tried("predicted bytes", lambda: _predicted(device, methods))
    yield from _tried("out of memory", lambda: _no_room(device))
    yield from _tried("two jobs, one device", lambda: _two_jobs(device))


def _tried(what: str, run: Callable[[], Check]) -> Iterator[Check]:
    start = time.perf_counter()
    try:
        found = run()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        found = Check(what, "failed", f"{type(error).__name__}: {reason}")
    found.what = what
    found.figures["wall_seconds"] = round(time.perf_counter() - start, 2)
    yield found


def as_json(found: list[Check], about: Mapping[str, str]) -> str:
    """What can be attached to an issue."""
    return json.dumps({"about": dict(about), "checks": [asdict(c) for c in found]}, indent=2) + "\n"


# --- methods ---------------------------------------------------------------------------------------


def _entry(sizes: tuple[int, ...], dropout: float = 0.0, **held: Any) -> ModelEntry:
    hidden, layers, heads, vocabulary = sizes
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 600,
    }
    held = {"dtype": "float32"} | held
    source = ConfigSource(kind="config", form="causal", config=config, **held)
    targets = ("q_proj", "v_proj")
    train = LoraTraining(kind="lora", rank=2, alpha=4, dropout=dropout, targets=targets)
    return ModelEntry(label="random Llama", source=source, train=train)


def _objective(entry: ModelEntry, device: torch.device) -> tuple[Objective, Batch]:
    """The same random model and batch, whatever the device."""
    torch.manual_seed(0)
    assert isinstance(entry.source, ConfigSource)
    made = build_from_config(entry.source, entry.train, adapters_at_zero=False)
    data = sample_batch(transformers_config(entry.source.config), "causal", 4, 24)
    moved = {name: tensor.to(device) for name, tensor in data.items()}
    return Objective(made.module.to(device), made.loss), moved


@contextlib.contextmanager
def _drawn_on_cpu() -> Iterator[None]:
    """Within the block directions are those of the CPU's generator on every device."""

    def generator(self: Key, device: Any = "cpu") -> torch.Generator:
        return torch.Generator().manual_seed(self.number)

    def moved(draw: Any) -> Any:
        return lambda *sizes, device=None, **rest: draw(*sizes, **rest).to(device or "cpu")

    with (
        mock.patch.object(Key, "generator", generator),
        mock.patch.object(torch, "randn", moved(torch.randn)),
        mock.patch.object(torch, "randint", moved(torch.randint)),
    ):
        yield


def _gradients(entry: ModelEntry, method: MethodEntry, device: torch.device, eps: Any) -> Any:
    """Gradient estimates of three steps, and how differences were taken (as given, or settled)."""
    objective, data = _objective(entry, device)
    estimator, found = method.build(), []
    optimizer = method.optimizer.build(objective.theta)
    with _drawn_on_cpu():
        if eps is None:
            eps = settle(objective, estimator, data, Key(0, 0))
        if eps is not None:
            eps.adopt(estimator)
        for step in range(STEPS):
            batches = [data] * len(estimator.passes(step))
            estimate = estimator.estimate(objective, batches, Key(0, step))
            found.append(estimate.gradient.detach().cpu().clone())
            update(objective, optimizer, estimate)
    return found, eps


def _methods(device: torch.device, methods: Mapping[str, MethodEntry], precision: str) -> Check:
    entry = _entry(SMALL, **PRECISIONS[precision])
    errors, limits = {}, {}
    for name, method in methods.items():
        wanted, settled = _gradients(entry, method, torch.device("cpu"), None)
        found, _ = _gradients(entry, method, device, settled)
        first = _error(found[0], wanted[0])
        finite = all(bool(g.isfinite().all()) for g in found)
        errors[name] = first if finite else float("inf")
        rounded = settled is not None and not settled.float32 and precision != "float32"
        limits[name] = NOISY if rounded else CLOSE[precision]
    worst = max(errors, key=lambda name: errors[name])
    far = [name for name, error in errors.items() if not error <= limits[name]]
    remark = (
        f"{len(errors)} methods, {STEPS} steps; largest difference to the CPU {errors[worst]:.1e}"
    )
    remark += f" ({worst})" + (f"; too far: {', '.join(far)}" if far else "")
    shown = {name: None if error == float("inf") else error for name, error in errors.items()}
    return Check("", "failed" if far else "ok", remark, {"relative_error": shown})


def _error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


# --- the device ------------------------------------------------------------------------------------


def _masks(device: torch.device) -> Check:
    """Gradients with dropout under plans that recompute, on the last device there is."""
    count = torch.get_device_module(device).device_count() if device.type != "cpu" else 1
    place = torch.device(device.type, count - 1) if device.type != "cpu" else device
    objective, data = _objective(_entry(SMALL, dropout=0.3), place)
    errors = {}
    wanted = None
    for name in ("none", "per_block", "selective", "sub_layer"):
        with objective.noise(Key(0, 0)), PLANS[name](objective, data):
            _, gradient = objective.gradient(data)
        wanted = gradient.clone() if wanted is None else wanted
        errors[name] = _error(gradient, wanted)
    worst = max(errors.values())
    remark = f"{len(errors)} plans on {place}, largest difference {worst:.1e}"
    return Check("", "ok" if worst < 1e-4 else "failed", remark, {"relative_error": errors})


def _predicted(device: torch.device, methods: Mapping[str, MethodEntry]) -> Check:
    """Bytes of a step traced without weights against those of the device."""
    names = ("bp_vanilla", "bp_checkpointing", "fmad_vanilla", "zo_vanilla")
    config, batch, length = (SMALL, 4, 24) if device.type == "cpu" else (LARGE, 4, 128)
    entry, figures, errors = _entry(config, dtype="bfloat16"), {}, {}
    traced, real = Bench(entry), Bench(entry, device.type)
    for name in names:
        ahead = traced.cost(name, methods[name], batch, length)
        measured = real.cost(name, methods[name], batch, length)
        allocated = measured.allocated_bytes or measured.peak_bytes
        errors[name] = ahead.peak_bytes / allocated - 1
        figures[name] = {
            "predicted": ahead.peak_bytes,
            "allocated": allocated,
            "reserved": measured.reserved_bytes,
            "time_forwards": measured.time,
        }
    worst = max(errors.values(), key=abs)
    words = ", ".join(f"{name} {error:+.1%}" for name, error in errors.items())
    state = "ok" if abs(worst) <= PREDICTED else "failed"
    return Check("", state, f"beyond weights: {words}", {"bytes": figures})


def _no_room(device: torch.device) -> Check:
    try:
        torch.empty(2**50, device=device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    else:
        return Check("", "failed", "2**50 numbers found room")
    free(device)
    objective, data = _objective(_entry(SMALL), device)
    loss, _ = objective.gradient(data)
    state = "ok" if bool(loss.isfinite()) else "failed"
    return Check("", state, "recognised, and the device works afterwards", {"message": reason})


JOB = """
import sys, time
from pathlib import Path
from costbp.device_pool import device_slot
with device_slot("cuda", Path(sys.argv[1])):
    start = time.time(); time.sleep(1); print(start, time.time())
"""


def _two_jobs(device: torch.device) -> Check:
    if device.type != "cuda":
        return Check("", "skipped", "no CUDA device")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[device.index or 0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", JOB, folder]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": given}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        jobs = [subprocess.Popen(command, **pipes) for _ in range(2)]
        spans = sorted(tuple(map(float, job.communicate(timeout=120)[0].split())) for job in jobs)
    apart = spans[0][1] <= spans[1][0]
    words = "one waited for the other" if apart else "both held it at once"
    return Check("", "ok" if apart else "failed", words, {"spans": spans})
