"""A model and a task: which go together, and where what is prepared of them lies."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from costbp.config.catalog import ModelEntry, TaskEntry
from costbp.config.sources import ConfigSource, PythonSource
from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.tasks.base import load_task


class Pair(NamedTuple):
    """A model's and a task's entry, their names, the folder of what has been fetched, and the file of
    the prepared splits."""

    model: ModelEntry
    task: TaskEntry
    names: tuple[str, str]
    assets: Path
    file: Path

    @classmethod
    def of(cls, plan: Plan, model: str, task: str) -> Pair:
        """The pair of two names of a study's catalog."""
        entries = plan.catalog.models[model], plan.catalog.tasks[task]
        assets = plan.study.paths.cache / "assets"
        return cls(*entries, (model, task), assets, plan.prepared(model, task))

    def check(self) -> None:
        """Refuse a model that can't be asked the task.

        Raises:
            UserError: free text for a classifier; images for a model that sees none, or none for one
                that needs them; an option that training doesn't have.
        """
        (model, task), entry = self.names, self.model
        source, definition = entry.source, load_task(self.task.loader)
        if isinstance(source, ConfigSource) and source.loss_chunk is not None:
            raise UserError(f"model '{model}': source.loss_chunk serves `costbp cost` alone")
        if not (entry.writes_text or definition.names):
            raise UserError(
                f"model '{model}' puts out classes, and the answers of task '{task}' are free text; "
                "use a model of form causal or image_text"
            )
        if definition.shows_images and not entry.sees:
            raise UserError(
                f"task '{task}' has images, and model '{model}' reads none; use a model of form "
                "image_text, or one of kind python with images: true"
            )
        if unknown := [name for name in self.task.label_words if name not in definition.names]:
            raise UserError(
                f"task '{task}': label_words describes '{unknown[0]}', and the answers are "
                f"{', '.join(definition.names) or 'free text'}"
            )
        if isinstance(source, PythonSource) and source.images and not definition.shows_images:
            raise UserError(
                f"model '{model}' needs images, and task '{task}' has none; use another model"
            )


def check_pairs(plan: Plan) -> Plan:
    """The plan, if every model can be asked the tasks that it is set."""
    insight = plan.study.insight
    for model, task in (*plan.pairs(), *(insight.pairs if insight else ())):
        Pair.of(plan, model, task).check()
    return plan
