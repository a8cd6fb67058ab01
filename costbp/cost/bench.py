"""Cost of a step at any size: on meta without weights, or measured with random ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from costbp.config.catalog import ModelEntry
from costbp.config.methods import MethodEntry
from costbp.config.profiles import Profile
from costbp.config.read import validate
from costbp.config.shares import Shares
from costbp.config.sources import ConfigSource
from costbp.config.trainables import LoraTraining, VirtualTokens
from costbp.cost.loops import Part, loop_step
from costbp.cost.products import SIZES, knows, products, shares
from costbp.cost.record import CostRecord
from costbp.cost.step import CostCounter, StepCost, forward_flops, measure_step
from costbp.cost.weightless import MissingNumbersError, weightless
from costbp.device import allocator_peaks, forget_peaks, free, to_device
from costbp.errors import UserError, first_line, suggest
from costbp.estimators.base import Estimator
from costbp.estimators.memory_plans import blocks
from costbp.estimators.update import made
from costbp.meter import Timeline
from costbp.models.architecture import longest, sample_batch, transformers_config
from costbp.models.build import build_from_config, queries_and_values
from costbp.models.libraries import with_transformers
from costbp.models.packed import PackedLinear
from costbp.models.profiled import build_profiled
from costbp.objective import Batch, Key, at_work

DEVICES = ("meta", "cpu", "cuda")
CLASSES = 4  # of a classifier where no task says how many: AG News, the study's first task


def entry_from_config(path: Path) -> ModelEntry:
    """A model entry for a ``config.json`` in the hub's format (the file or its folder): a classifier
    of an encoder, LoRA r=1 on queries and values, base in the file's dtype.

    Raises:
        UserError: the file can't be read, or it isn't known what queries and values are called.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
        architecture = " ".join(values.get("architectures") or ())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: is not a readable JSON file ({first_line(error)})") from error
    with with_transformers():
        from transformers.models.auto import modeling_auto

        encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    form = "causal"
    if "vision_config" in values:
        form = "image_text"
    elif "SequenceClassification" in architecture or (
        values.get("model_type") in encoders and "LM" not in architecture.replace("MaskedLM", "")
    ):
        form = "classifier"
    source = {
        "kind": "config",
        "form": form,
        "config": values,
        "dtype": str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"),
    }
    entry = {"label": file.parent.name, "source": source, "train": {"kind": "full"}}
    found = validate(ModelEntry, entry, [(file, entry)])
    assert isinstance(found.source, ConfigSource)
    entry["train"] = {
        "kind": "lora",
        "rank": 1,
        "alpha": 1,
        "targets": queries_and_values(found.source),
    }
    return validate(ModelEntry, entry, [(file, entry)])


@dataclass(frozen=True)
class Trace:
    """A step in FLOPs, in bytes at its peak, in the storages that come and go in it, and in what a GPU's
    allocator makes of them."""

    flops: float
    bytes: int
    timelines: tuple[Timeline, ...]
    allocated: int
    reserved: int

    @property
    def resident(self) -> float:
        """Bytes that are there all the time."""
        return self.bytes - max(timeline.peak for timeline in self.timelines)


class Bench:
    """A model of full size on one device, ready to have steps of any method counted on it.

    Args:
        entry: a model with a ``config`` source.
        device: ``meta`` counts without weights; ``cpu`` and ``cuda`` run with random ones.
        classes: of a classifier.
        name: what records call it; by default its label.
        profile: whose training loop is traced; none: this package's.

    Raises:
        UserError: no ``config`` source; an unknown device, or CUDA asked for and absent; a profile that
            the model, or a device with numbers, can't have.
    """

    def __init__(
        self,
        entry: ModelEntry,
        device: str = "meta",
        classes: int = CLASSES,
        name: str = "",
        profile: Profile | None = None,
    ) -> None:
        if not isinstance(entry.source, ConfigSource):
            raise UserError(
                f"model '{entry.label}' can't be built at full size without weights: its source is "
                f"of kind '{entry.source.kind}', not 'config'"
            )
        if device not in DEVICES:
            raise UserError(f"--device {device}: {suggest(device, DEVICES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device here; --device meta needs none")
        self.entry, self.device, self.classes, self.form = entry, device, classes, entry.source.form
        self.name = name or entry.label
        self.profile = None if profile is None or profile.loop == "ours" else profile
        if self.profile is not None and device != "meta":
            raise UserError(f"--profile is traced without weights: --device meta, not {device}")
        self.config = transformers_config(entry.source.config, classes)
        self._forwards: dict[Any, float] = {}  # shape of a batch -> FLOPs
        with self.on_device():
            if self.profile is not None:
                self.objective = build_profiled(entry, self.profile, classes)
            else:
                self.objective = build_from_config(entry.source, entry.train, classes)
        self.blocks = len(blocks(self.objective.module))

    @property
    def parameters(self) -> int:
        """Weights of the model without adapters, packed ones counted one by one."""
        module, added = self.objective.module, LoraTraining | VirtualTokens
        apart = isinstance(self.entry.train, added)
        plain = sum(p.numel() for p in module.parameters() if not (apart and p.requires_grad))
        packed = [m for m in module.modules() if isinstance(m, PackedLinear)]
        return plain + sum(m.in_features * m.out_features for m in packed)

    @property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        found = longest(self.config.to_dict()) or 2**17  # relative positions have no end
        return found - self.entry.virtual

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within the block new tensors are made on the bench's device."""
        with weightless() if self.device == "meta" else torch.device(self.device):
            yield

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Within the block steps run on the bench's device.

        Raises:
            UserError: one needs numbers that a trace doesn't have.
        """
        try:
            with self.on_device():
                yield
        except MissingNumbersError as error:
            raise UserError(
                f"module {at_work(self.objective.module, error)}: operator '{error}' asks for "
                "numbers that a trace without weights doesn't have; run --device cpu on a small "
                "configuration of this family"
            ) from error

    def sample(self, batch: int, length: int) -> Batch:
        """A random batch of that many examples and tokens.

        Raises:
            UserError: longer than the model's positions, or too short for an image.
        """
        if self.entry.virtual and length > self.longest:
            raise UserError(
                f"length {length} exceeds the {self.longest} positions that train.tokens = "
                f"{self.entry.virtual} leaves"
            )
        with self.on_device():
            padding = self.profile is None or self.profile.padding
            data = sample_batch(self.config, self.form, batch, length, self.classes, padding)
        return data if self.device == "meta" else to_device(data, torch.device(self.device))

    def cost(
        self,
        name: str,
        method: MethodEntry,
        batch: int,
        length: int,
        *,
        timed: bool = True,
        task: str | None = None,
        part: Part = "step",
    ) -> CostRecord:
        """A step of one method; its seconds are None on meta. On CUDA the record also holds what
        torch's allocator says of the step.

        Raises:
            UserError: the length is beyond the model's, or the method can't run on this model.
        """
        data, estimator = self.sample(batch, length), method.build()
        timed = timed and self.device != "meta"
        counter = CostCounter(estimator, forwards=self._forwards)
        with self.tracing():
            found = self._measured(method, data, counter, True, timed, part)
            allocated = self._allocated(estimator, data) if timed else {}
        return CostRecord(
            model=self.name,
            task=task,
            method=name,
            profile=self.profile.label if self.profile else None,
            device=self.device,
            batch=batch,
            seq=length,
            closed_form=None if self.profile else method.closed_form(self._shares(data)),
            **asdict(found),
            **allocated,
        )

    def forward_flops(self, batch: int, length: int) -> float:
        """FLOPs of one no-grad forward: a unit."""
        with self.tracing():
            return forward_flops(self.objective, self.sample(batch, length), self._forwards)

    def trace(self, method: MethodEntry, batch: int, length: int, *, replay: bool = False) -> Trace:
        """A step of one method, in half the time of ``cost``; what a GPU's allocator makes of it if
        ``replay`` asks for it.

        Raises:
            UserError: see ``cost``.
        """
        data = self.sample(batch, length)
        counter = CostCounter(method.build(), named=False, forwards=self._forwards)
        with self.tracing():
            found = self._measured(method, data, counter, replay)
        total = found.weights_bytes + found.state_bytes + found.peak_bytes
        taken = found.allocated or 0, found.reserved or 0
        return Trace(found.flops, total, tuple(counter.timelines), *taken)

    def _measured(
        self,
        method: MethodEntry,
        data: Batch,
        counter: CostCounter,
        replay: bool,
        timed: bool = False,
        part: Part = "step",
    ) -> StepCost:
        if self.profile is not None:
            found, timeline = loop_step(self.objective, method, data, self.profile, part, replay)
            counter.timelines.append(timeline)
            return found
        optimizer = method.optimizer.build(self.objective.theta)
        return measure_step(
            self.objective,
            method.build(),
            optimizer,
            data,
            timed=timed,
            counter=counter,
            replay=replay,
        )

    def _allocated(self, estimator: Estimator, data: Batch) -> dict[str, int]:
        """Bytes of a first step as the allocator of a GPU tells, beyond what is there before it."""
        device = torch.device(self.device)
        if device.type == "cpu":
            return {}
        free(device)
        forget_peaks(device)
        before = torch.cuda.memory_allocated(device)
        made(estimator, self.objective, [data] * len(estimator.passes(0)), Key(0, 0))
        peak, reserved = allocator_peaks(device)
        return {"allocated_bytes": peak - before, "reserved_bytes": reserved}

    def _shares(self, data: Batch) -> Shares:
        """What closed forms know of the model; the rule of thumb where its family's products aren't
        known."""
        source, tensors = self.entry.source, len(self.objective.slices)
        assert isinstance(source, ConfigSource)
        if source.config["model_type"] not in SIZES or not knows(self.entry.train):
            return Shares(tensors=tensors, blocks=self.blocks)
        rows, length = data["input_ids"].shape
        grid = int(data["image_grid_thw"][0, 1]) if "image_grid_thw" in data else 0
        found = products(source, self.entry.train, rows, length, self.classes, grid)
        return replace(shares(found, tensors), blocks=self.blocks)
