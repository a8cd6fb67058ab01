"""What the tests on a pretended GPU step with: methods of short cycles, small models on a device."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from benchmarks.families import family_batch, family_objective
from costbp.config import load_plan
from costbp.meter import Mode
from costbp.objective import Batch, Objective
from tests.conftest import ROOT
from tests.small import SIZE


class Plain(Mode):
    """Lets every operator pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@functools.cache
def methods() -> dict[str, Any]:
    """The catalog's; snapshots, masks and calibrations anew every second step, of few batches."""

    def frequent(method):
        text = method.model_dump(mode="json")
        twos = {"accumulate", "period", "snapshot_batches", "refresh", "every"}
        for part in (text, text["svrg"] or {}, text["estimator"].get("directions", {})):
            part.update((key, 2) for key in twos & set(part) if part[key] not in (1, None))
        return type(method).model_validate(text)

    with contextlib.chdir(ROOT):
        return {name: frequent(method) for name, method in load_plan().catalog.methods.items()}


def moved(family: str, device: torch.device, **options: Any) -> tuple[Objective, Batch]:
    objective = family_objective(family, **SIZE | options)
    batch = family_batch(family, 2, 8, SIZE["vocabulary"])
    objective = Objective(objective.module.to(device), objective.loss)
    return objective, {name: value.to(device) for name, value in batch.items()}


def unasked(waits: list[str]) -> list[str]:
    """Without those of transformers, which looks whether fused attention can do without its mask."""
    return [place for place in waits if "transformers/masking_utils.py" not in place]
