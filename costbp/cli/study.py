"""Commands that work on a study: each stage of the workflow, and what people look at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from costbp.cli.app import (
    Budget,
    Config,
    Frozen,
    Method,
    Model,
    Out,
    Task,
    app,
    ask_hub,
    cell_of,
    known,
    load,
)
from costbp.config.catalog import Catalog, state
from costbp.config.groups import load_groups
from costbp.config.load import DEFAULT
from costbp.config.read import laid_over
from costbp.config.study import Plan
from costbp.config.yaml_file import read_yaml
from costbp.console import say, table
from costbp.errors import UserError, suggest

if TYPE_CHECKING:
    from costbp.analysis.frames import Frames

KINDS = (*Catalog.model_fields, "groups", "claims", "studies")  # what `list` lists


@app.command()
def assets(
    config: Config = None,
    plan: Frozen = None,
    only: Annotated[str | None, typer.Option(help="One asset instead of all.")] = None,
    out: Out = None,
) -> None:
    """Fetch and check the models and data of a study; later stages work offline."""
    ask_hub()
    from costbp.assets.fetch import fetch
    from costbp.files import write_json

    study = load(config, plan)
    wanted = study.assets(insight=only is not None)
    if only is not None and only not in wanted:
        raise UserError(f"study '{study.name}' needs no asset '{only}'; {suggest(only, wanted)}")
    for name, asset in wanted.items():
        if only in (None, name):
            folder = fetch(name, asset, study.study.paths.cache, say=say)
            print(f"{name}: {folder}")
            if out is not None:
                write_json(out, {"asset": name, "state": state(asset), "folder": str(folder)})


@app.command()
def prepare(
    model: Model, task: Task, config: Config = None, plan: Frozen = None, out: Out = None
) -> None:
    """Encode the splits of a task for a model: token ids, or features of the frozen encoder."""
    from costbp.data.pairs import Pair
    from costbp.data.prepare import load_prepared
    from costbp.data.prepare import prepare as encode
    from costbp.files import write_json

    study = load(config, plan)
    known(study, "models", model)
    known(study, "tasks", task)
    path = encode(Pair.of(study, model, task))
    facts = load_prepared(path).facts
    print(f"{path}: {facts['examples']}, majority {facts['majority']['test']:.3f} (test)")
    if truncated := sum(facts["truncated"].values()):
        limit = study.catalog.tasks[task].max_length
        say(f"{model}/{task}: {truncated} examples cut to {limit} tokens")
    if out is not None:
        write_json(out, {"file": str(path), **facts})


@app.command()
def train(
    model: Model,
    task: Task,
    methods: Annotated[
        str, typer.Option("--method", "-M", help="Names in methods.yaml, comma-separated.")
    ],
    budget: Budget,
    config: Config = None,
    plan: Frozen = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**63 - 1, help="Instead of the study's seeds."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start although the traced memory doesn't fit.")
    ] = False,
    out: Out = None,
) -> None:
    """Run experiments, seed after seed. Finished seeds are kept, interrupted ones continue."""
    from costbp.tracking.mlflow_store import live
    from costbp.train.experiment import run_specs, write_manifest

    study = load(config, plan)
    names = dict.fromkeys(name.strip() for name in methods.split(","))
    cells = [cell_of(study, model, task, name, budget) for name in names]

    specs = [study.spec(cell, s) for cell in cells for s in (seed or study.seeds(cell))]
    records = run_specs(study, specs, force=force, done=live(study))
    if out is not None:
        write_manifest(out, records, study.study.paths.store)


@app.command()
def trials(
    model: Model,
    task: Task,
    method: Method,
    budget: Budget,
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
) -> None:
    """Run the trials of learning rates of one experiment, on the validation split, and choose."""
    from costbp.train.tune import run_trials, write_manifest

    study = load(config, plan)
    cell = cell_of(study, model, task, method, budget)
    tuned = run_trials(study, cell)
    write_manifest(study, cell, tuned, out)
    print(f"{cell}: {tuned.choice.compact() if tuned.choice else tuned.note}")


@app.command()
def tune(config: Config = None, plan: Frozen = None, out: Out = None) -> None:
    """Write what the trials chose, and all of them, to the study's tuning file."""
    from costbp.train.tune import write_choices

    study = load(config, plan)
    write_choices(study, out or study.study.tuning.file)


@app.command()
def aggregate(config: Config = None, plan: Frozen = None) -> None:
    """Collect a study's records and cost files into tidy parquet tables."""
    from costbp.analysis.frames import collect, save

    study = load(config, plan)
    save(collect(study), study.results)


def results(config: Config, plan: Frozen) -> tuple[Plan, Frames, Path]:
    """A study, its aggregated results, and the folder of what people read."""
    from costbp.analysis.frames import load as load_frames

    study = load(config, plan)
    return study, load_frames(study.results), study.study.paths.reports


@app.command()
def tables(config: Config = None, plan: Frozen = None) -> None:
    """Write the summary and cost tables (Markdown, CSV, LaTeX)."""
    from costbp.analysis.tables import write

    study, frames, folder = results(config, plan)
    write(study, frames, folder / "tables")


@app.command()
def figures(config: Config = None, plan: Frozen = None) -> None:
    """Draw the figures (PNG, PDF, and SVG for the page)."""
    from costbp.analysis.figures import write

    study, frames, folder = results(config, plan)
    write(study, frames, folder / "figures")


@app.command()
def claims(config: Config = None, plan: Frozen = None) -> None:
    """Hold every claim against the runs; verdicts are computed."""
    from costbp.analysis.claims import write

    write(*results(config, plan))


@app.command()
def report(
    config: Config = None,
    plan: Frozen = None,
    readme: Annotated[
        Path | None, typer.Option(help="Rewrite this file's excerpt of the results, too.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Report what the store holds, and what is missing.")
    ] = False,
    retry: Annotated[
        str | None, typer.Option(help="Command that computes what is missing, for --partial.")
    ] = None,
) -> None:
    """Write the self-contained page index.html from tables, figures and claims."""
    from costbp.analysis import partial as part
    from costbp.analysis.readme import write as write_excerpt
    from costbp.analysis.report import write

    if partial:
        if readme is not None:
            raise UserError("--readme: an excerpt is of a whole study, never of a partial report")
        study = load(config, plan)
        files = " --configfile " * bool(config) + " ".join(map(str, config or ()))
        print(part.write(study, retry or f"snakemake --cores all{files}"))
        return
    study, frames, folder = results(config, plan)
    write(study, frames, folder)
    part.clear(folder)
    if readme is not None:
        write_excerpt(study, frames, folder, readme)
    print(folder / "index.html")


@app.command()
def track(config: Config = None, plan: Frozen = None, out: Out = None) -> None:
    """Bring MLflow up to date with the run store; logs nothing twice."""
    from costbp.files import write_json
    from costbp.tracking.mlflow_store import sync, tracking_uri, without_secrets

    study = load(config, plan)
    added, finished = sync(study)
    print(f"{added} of {finished} runs added to {without_secrets(tracking_uri(study))}")
    if out is not None:
        write_json(out, {"study": study.name, "runs": finished})


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Run stores of others, as their runs/.")],
    config: Config = None,
) -> None:
    """Copy finished runs of other stores into the study's, those that can be trusted."""
    from costbp.train.merge import merge as take

    counts = take(load(config, None), stores)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    if counts["refused"]:
        raise typer.Exit(1)


@app.command()
def ui(
    config: Config = None,
    plan: Frozen = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Start the MLflow UI on the study's runs."""
    from costbp.tracking.ui import serve

    serve(load(config, plan), port)


@app.command()
def status(
    config: Config = None,
    plan: Frozen = None,
    every: Annotated[bool, typer.Option("--runs", help="List every run.")] = False,
) -> None:
    """Show a study's runs: done, running, waiting, failed, and the time left."""
    from costbp.train.status import counts, seconds_left, statuses

    study = load(config, plan)
    found = statuses(study)
    tally = ", ".join(f"{count} {state}" for state, count in counts(found).items())
    print(f"{study.name}: {len(found)} runs: {tally}")
    left = seconds_left(found)
    if left:
        cores = os.cpu_count() or 1
        print(
            f"about {left / 60:.0f} core minutes left ({left / 60 / cores:.0f} min on {cores} cores)"
        )
    shown = [run for run in found if every or run.state not in ("done", "waiting")]
    if shown:
        rows = [
            (
                "/".join(r.cell),
                str(r.seed),
                r.outcome or r.state,
                f"{100 * r.fraction:.0f} %",
                f"{r.seconds:.0f}",
            )
            for r in shown
        ]
        table("", ("experiment", "seed", "state", "budget", "seconds"), rows)


@app.command(name="list")
def list_entries(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}.")] = None,
    config: Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Whole entries, by kind and name.")
    ] = False,
) -> None:
    """List what a study can name: entries of the catalog, claims, and the studies that ship."""
    study = load(config, None)
    if kind not in (None, *KINDS):
        raise UserError(f"list {kind}: no such kind; {suggest(kind, KINDS)}")
    found = {name: entries(study, name) for name in KINDS if kind in (None, name)}
    if as_json:
        print(json.dumps(found if kind is None else found[kind], indent=2))
        return
    for name, rows in found.items():
        head = ("name", *COLUMNS.get(name, ("label", "notes")))
        table(
            name,
            head,
            [(key, *(str(row.get(c) or "") for c in head[1:])) for key, row in rows.items()],
        )


COLUMNS = {
    "groups": ("members",),
    "claims": ("title", "reading"),
    "studies": ("file", "description"),
}


def entries(study: Plan, kind: str) -> dict[str, dict[str, Any]]:
    """Name -> keys of every entry of a kind."""
    if kind == "studies":
        files = [DEFAULT, *sorted((DEFAULT.parent / "studies").glob("*.yaml"))]
        read = {file: laid_over([(file, read_yaml(file))]) for file in files}
        return {
            data.get("study", file.stem): {
                "file": str(file),
                "description": data.get("description", ""),
            }
            for file, data in read.items()
        }
    if kind == "groups":
        groups = load_groups(study.study.catalog, study.catalog)
        return {
            f"{of}.{name}": {"members": ", ".join(members)}
            for of, found in groups.items()
            for name, members in found.items()
        }
    known = study.claims if kind == "claims" else getattr(study.catalog, kind)
    return {name: entry.model_dump(mode="json") for name, entry in known.items()}


@app.command()
def validate(config: Config = None) -> None:
    """Check a study and the catalog; exit code 0 means every reference is good."""
    study = load(config, None)
    print(f"{study.name}: {sum(1 for _ in study.cells())} experiments, {study.runs} runs, valid")


@app.command()
def schemas(folder: Annotated[Path, typer.Argument()] = Path("workflow/schemas")) -> None:
    """Write the JSON schemas of the configuration files."""
    from costbp.config.schemas import write

    for path in write(folder):
        print(path)
