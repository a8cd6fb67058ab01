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
    mem_mb: int | None = Field(None, ge=100, description="MB of a job; default: by its model.")
    runtime: int | None = Field(None, ge=1, description="Minutes of a job; default: by its FLOPs.")
    growth: float = Field(
        1.5, ge=1, description="What each next attempt of a job asks for, times the last."
    )
    memory: str | None = Field(
        None, description="What a run may take of its device, as 24GB; default: what a GPU has."
    )
    checkpoint_seconds: float = Field(
        20.0,
        ge=0,
        description="Between two checkpoints of a run; longer where writing one takes more than a "
        "twentieth of it, but for 0: after every step.",
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
