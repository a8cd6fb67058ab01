"""The command line's frame: options that commands share, and how mistakes end."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from costbp import __version__
from costbp.config.load import load_plan, settled
from costbp.config.study import Cell, Plan
from costbp.console import say
from costbp.data.pairs import check_pairs
from costbp.errors import UserError, suggest
from costbp.files import FULL, unwritten

OFFLINE = "HF_HUB_OFFLINE"
SAID = os.environ.get(OFFLINE)  # what the user says of the hub
os.environ.setdefault(OFFLINE, "1")  # models come from assets; only what fetches asks the hub


def ask_hub() -> None:
    """Let this process ask the hub, unless the user forbids it. Before anything of the hub's is
    imported."""
    if SAID is None:
        os.environ.pop(OFFLINE, None)


app = typer.Typer(
    help="What does avoiding backpropagation cost? Train, measure and compare BP, FmAD and ZO.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="Study file laid over config/config.yaml; repeatable."),
]
Frozen = Annotated[
    Path | None,
    typer.Option("--plan", help="Resolved plan written by the Snakefile; replaces --config."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Name in the catalog's models.yaml.")]
Task = Annotated[str, typer.Option("--task", "-t", help="Name in the catalog's tasks.yaml.")]
Method = Annotated[str, typer.Option("--method", "-M", help="Name in the catalog's methods.yaml.")]
Budget = Annotated[str, typer.Option("--budget", "-b", help="Name in the catalog's budgets.yaml.")]
Out = Annotated[Path | None, typer.Option("--out", help="Manifest to write, for the workflow.")]


def load(config: Sequence[Path] | None, frozen: Path | None) -> Plan:
    """The plan that a command works on."""
    if frozen is None:
        return settled(check_pairs(load_plan(config or ())))
    try:
        return settled(Plan.model_validate_json(frozen.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{frozen}: is not a plan written by the Snakefile") from error


def known(plan: Plan, kind: str, name: str) -> None:
    """Refuse a name that the catalog doesn't have."""
    entries = getattr(plan.catalog, kind)
    if name not in entries:
        raise UserError(
            f"{plan.study.catalog / kind}.yaml: no entry '{name}'; {suggest(name, entries)}"
        )


def cell_of(plan: Plan, model: str, task: str, method: str, budget: str) -> Cell:
    """The experiment of four names, all of them known."""
    cell = Cell(model, task, method, budget)
    for kind, name in zip(("models", "tasks", "methods", "budgets"), cell, strict=True):
        known(plan, kind, name)
    return cell


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"costbp {__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and a non-zero exit code."""
    gc.set_threshold(100_000)  # imports make many objects and drop none: a fifth of their time
    try:
        app()
    except UserError as error:
        say(f"costbp: {error}")
        sys.exit(error.code)
    except KeyboardInterrupt:
        say("costbp: interrupted")
        sys.exit(130)
    except OSError as error:
        if error.errno not in FULL:
            raise
        path = Path(error.filename or ".")
        say(f"costbp: cannot write {path}: {unwritten(error, path.parent)}")
        sys.exit(2)
