"""Cost of a step at any size: on meta without weights, or measured with random ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from costbp.config.catalog import LoraTraining, ModelEntry
from costbp.config.load import validate
from costbp.config.methods import MethodEntry
from costbp.config.sources import ConfigSource
from costbp.cost.memory import theory_bytes
from costbp.cost.products import SIZES, Shares, products, shares
from costbp.cost.step import (
    CostCounter,
    by_category,
    forward_only,
    median_seconds,
    resident_bytes,
)
from costbp.cost.units import forward_units
from costbp.cost.weightless import MissingNumbersError, weightless
from costbp.device import allocator_peaks, forget_peaks, free, to_device
from costbp.errors import UserError, suggest
from costbp.estimators import Estimator, build_estimator
from costbp.estimators.memory_plans import blocks
from costbp.models.architecture import longest, sample_batch, transformers_config
from costbp.models.build import build_from_config
from costbp.models.packed import PackedLinear
from costbp.objective import Batch, Key, at_work

DEVICES = ("meta", "cpu", "cuda")
UNTIMED: dict[str, float | None] = {"seconds": None, "forward_seconds": None}
CLASSES = 4  # of a classifier where no task says how many: AG News, the study's first task


def entry_from_config(path: Path) -> ModelEntry:
    """A model entry for a ``config.json`` in the hub's format (the file or its folder): LoRA r=1 on
    queries and values, base in the file's dtype.

    Raises:
        UserError: the file can't be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a readable JSON file ({error})") from error
    architecture = " ".join(values.get("architectures") or ())
    form = "causal"
    if "vision_config" in values:
        form = "image_text"
    elif "SequenceClassification" in architecture or "MaskedLM" in architecture:
        form = "classifier"
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16")
    targets = ["query", "value"] if form == "classifier" else ["q_proj", "v_proj"]
    entry = {
        "label": file.parent.name,
        "source": {"kind": "config", "form": form, "config": values, "dtype": dtype},
        "train": {"kind": "lora", "rank": 1, "alpha": 1, "targets": targets},
    }
    return validate(ModelEntry, entry, [(file, entry)])


class Bench:
    """A model of full size on one device, ready to have steps of any method counted on it.

    Args:
        entry: a model with a ``config`` source.
        device: ``meta`` counts without weights; ``cpu`` and ``cuda`` run with random ones.
        classes: of a classifier.

    Raises:
        UserError: no ``config`` source; an unknown device, or CUDA asked for and absent.
    """

    def __init__(self, entry: ModelEntry, device: str = "meta", classes: int = CLASSES) -> None:
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
        self.config = transformers_config(entry.source.config, classes)
        with self.there():
            self.objective = build_from_config(entry.source, entry.train, classes)
        self.blocks = len(blocks(self.objective.module))

    @property
    def parameters(self) -> int:
        """Weights of the model without adapters, packed ones counted one by one."""
        module, lora = self.objective.module, isinstance(self.entry.train, LoraTraining)
        plain = sum(p.numel() for p in module.parameters() if not (lora and p.requires_grad))
        packed = [m for m in module.modules() if isinstance(m, PackedLinear)]
        return plain + sum(m.in_features * m.out_features for m in packed)

    @property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        return longest(self.config.to_dict()) or 2**17  # relative positions have no end

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Within the block new tensors are made on the bench's device."""
        with weightless() if self.device == "meta" else torch.device(self.device):
            yield

    def cost(
        self, name: str, method: MethodEntry, batch: int, length: int, *, timed: bool = True
    ) -> dict[str, Any]:
        """One entry, as ``train.cost.measure_costs`` describes it; ``seconds`` are None on meta, and
        on CUDA ``allocator`` holds what torch's allocator says of the same step.

        Raises:
            UserError: the length is beyond the model's, or the method can't run on this model.
        """
        with self.there():
            data: Batch = sample_batch(self.config, self.form, batch, length, self.classes)
        if self.device != "meta":
            data = to_device(data, torch.device(self.device))
        source = self.entry.source
        assert isinstance(source, ConfigSource)
        estimator = build_estimator(method)
        optimizer = method.optimizer.build(self.objective.theta)
        with self.there():
            found = self._counted(estimator, optimizer, data)
            timed = timed and self.device != "meta"
            found |= self._measured(estimator, data) if timed else UNTIMED
        return {
            "model": self.entry.label,
            "method": name,
            "device": self.device,
            "batch": batch,
            "seq": length,
            "theory_units": forward_units(
                method, len(self.objective.slices), self.blocks, self._shares(data)
            ),
            "theory_bytes": theory_bytes(method, source, self.entry.train, batch, length),
            **found,
        }

    def _counted(
        self, estimator: Estimator, optimizer: torch.optim.Optimizer, data: Batch
    ) -> dict[str, Any]:
        """FLOPs, units and bytes of a step: mean and peak over the estimator's cycle."""
        objective, counter = self.objective, CostCounter(estimator)
        costs = []
        try:
            for step in range(estimator.cycle):
                batches = [data] * len(estimator.passes(step))
                costs.append(counter(objective, batches, Key(0, step)))
        except MissingNumbersError as error:
            raise UserError(
                f"module {at_work(objective.module, error)}: operator '{error}' asks for numbers "
                "that a trace without weights doesn't have; run --device cpu on a small "
                "configuration of this family"
            ) from error
        objective.theta.grad = objective.buffer
        optimizer.step()  # fills its state
        resident = resident_bytes(objective, optimizer, counter.state_bytes)
        largest = max(costs, key=lambda cost: cost.peak_bytes)
        return {
            "forward_units": mean(cost.units for cost in costs),
            "flops": mean(cost.flops for cost in costs),
            "forward_flops": costs[0].forward_flops,
            "peak_bytes": largest.peak_bytes,
            "peak_by_category": by_category(resident, largest),
            "weights_bytes": resident["weights"],
            "state_bytes": sum(resident.values()) - resident["weights"],
            "d": objective.d,
        }

    def _shares(self, data: Batch) -> Shares:
        """Of the model's products; the rule of thumb for a family whose products aren't known."""
        source = self.entry.source
        assert isinstance(source, ConfigSource)
        if source.config["model_type"] not in SIZES:
            return Shares()
        rows, length = data["input_ids"].shape
        grid = int(data["image_grid_thw"][0, 1]) if "image_grid_thw" in data else 0
        return shares(products(source, self.entry.train, rows, length, self.classes, grid))

    def _measured(self, estimator: Estimator, data: Batch) -> dict[str, Any]:
        batches = [data] * len(estimator.passes(0))
        step = partial(estimator.estimate, self.objective, batches, Key(0, 0))
        device = torch.device(self.device)
        seconds = {
            "seconds": median_seconds(step, device),
            "forward_seconds": median_seconds(partial(forward_only, self.objective, data), device),
        }
        if self.device == "cpu":
            return seconds
        free(device)
        forget_peaks(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak, reserved = allocator_peaks(device)
        allocated = peak - before
        return seconds | {
            "allocator": {
                "allocated": allocated,
                "reserved": reserved,
                "fragmentation": 1 - (before + allocated) / reserved,
            }
        }
