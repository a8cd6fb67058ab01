"""Which models can be asked which tasks."""

from __future__ import annotations

from costbp.config.catalog import ConfigSource
from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.tasks.base import load_task


def check_pair(plan: Plan, model: str, task: str) -> None:
    """Refuse a model that can't be asked a task.

    Raises:
        UserError: free text for a classifier; images for a model that sees none, or none for one
            that needs them; an option that training doesn't have.
    """
    entry, definition = plan.catalog.models[model], load_task(plan.catalog.tasks[task].loader)
    if isinstance(entry.source, ConfigSource) and entry.source.loss_chunk is not None:
        raise UserError(f"model '{model}': source.loss_chunk serves `costbp cost` alone")
    if not (entry.writes_text or definition.names):
        raise UserError(
            f"model '{model}' puts out classes, and the answers of task '{task}' are free text; "
            "use a model of form causal or image_text"
        )
    if definition.shows_images and not entry.sees:
        raise UserError(
            f"task '{task}' has images, and model '{model}' reads none; use a model of form "
            "image_text or fusion"
        )
    if entry.source.form == "fusion" and not definition.shows_images:
        raise UserError(
            f"model '{model}' needs images, and task '{task}' has none; use a model of another form"
        )


def check_pairs(plan: Plan) -> Plan:
    """The plan, if every model of its experiments can be asked its tasks."""
    for model, task in plan.pairs():
        check_pair(plan, model, task)
    return plan
