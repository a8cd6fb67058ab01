"""What a study takes of the machine: a job's share of it, and folders."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from costbp.config.costs import card_bytes
from costbp.config.entries import Strict


class Resources(Strict):
    """What a training job asks of a cluster; without a scheduler only `gpu` matters."""

    methods_per_job: int = Field(
        1,
        ge=1,
        description="Experiments that a training job may run one after the other in one process, "
        "where runs take no longer than a process takes to start.",
    )
    gpu: int = Field(0, ge=0, description="GPUs of a training job.")
    mem_mb: int = Field(2500, ge=100, description="Memory of a training job.")
    runtime: int = Field(60, ge=1, description="Minutes a training job may take.")
    memory: str | None = Field(
        None, description="What a run may take of its device, as 24GB; default: what a GPU has."
    )
    tflops: float = Field(
        100.0, gt=0, description="TFLOP/s that a GPU sustains, for the estimate of a study's hours."
    )

    @field_validator("memory")
    @classmethod
    def _a_size(cls, memory: str | None) -> str | None:
        if memory is not None:
            card_bytes(memory)
        return memory


class Paths(Strict):
    """Folders, relative to the working directory."""

    store: Path = Field(Path("runs"), description="Run store, shared by all studies.")
    cache: Path = Field(Path("cache"), description="Assets and prepared data.")
    results: Path = Field(Path("results"), description="Manifests and tidy tables, by study.")
    reports: Path = Field(Path("reports"), description="What people read.")
    mlflow: Path = Field(Path("mlflow"), description="Local MLflow database and artifacts.")

    @field_validator("*")
    @classmethod
    def _no_patterns(cls, path: Path) -> Path:
        if re.search(r"[{}<>\x00-\x1f\x7f]", str(path)):
            raise ValueError(
                "has braces, angle brackets or a line break; Snakemake reads those as its own"
            )
        return path
