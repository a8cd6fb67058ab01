"""Commands that say what a step costs and what fits: ``cost`` and ``fit``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from costbp.cli.app import Config, Frozen, Out, app, known, load
from costbp.config.catalog import ModelEntry
from costbp.config.costs import card_bytes
from costbp.config.load import overlaid
from costbp.config.sources import ConfigSource
from costbp.config.study import Plan
from costbp.console import bar, table, track
from costbp.errors import UserError

if TYPE_CHECKING:
    from costbp.config.entries import Strict
    from costbp.config.profiles import Profile
    from costbp.cost.record import CostRecord, Fit, Needs

OF_PROFILES = "profile."  # prefix of settings that belong to the profile
ALIASES = {"lora.r": "train.rank", "lora.rank": "train.rank", "lora.alpha": "train.alpha"}

Methods = Annotated[
    str, typer.Option("--method", "-M", help="Comma-separated names; default: the study's.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A key of the model's entry, as lora.r=8 or source.bits=null."),
]
Profiled = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Whose training loop, of profiles.yaml: hf_trainer, litgpt, torchtune, ...; default: this "
        "package's.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="A list of objects on stdout.")]
Device = Annotated[
    str | None,
    typer.Option(help="meta (default) counts without weights; cpu and cuda run with random ones."),
]
BATCH, SEQ = 8, 64  # the study's length; a batch between those of its tasks


@app.command()
def cost(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Name in models.yaml, or a `config.json` in the hub's format."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="Measure on its data, or trace batches of its shape."),
    ] = None,
    method: Methods = "",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples a batch; default: the task's, or 8.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=2, help="Tokens an example; default: the task's, or 64.")
    ] = None,
    device: Device = None,
    profile: Profiled = None,
    settings: Settings = None,
    published: Annotated[
        bool, typer.Option("--published", help="Predict what others have measured, and score it.")
    ] = False,
    rows: Annotated[
        Path | None, typer.Option(help="Another table of published rows, of the same columns.")
    ] = None,
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What one step of each method costs: FLOPs, forward units, seconds, peak bytes by category.

    Models with a configuration (the study's nine, or any `config.json`) are traced at full size
    without weights. Models with weights are measured on a task's batches on the CPU.
    """
    if published:
        from costbp.cli.published import show_published

        show_published(load(config, plan), rows, as_json)
        return
    if model is None:
        raise UserError("name a --model, or ask for --published")
    from costbp.cost.bench import Bench
    from costbp.cost.pairs import pair_costs, traceable

    study = load(config, plan)
    loop, settings = profiled(study, profile, settings)
    entry = model_entry(study, model, settings)
    if task is not None:
        known(study, "tasks", task)
    given = {"--batch": batch, "--seq": seq, "--device": device, "--set": settings}
    given["--profile"] = profile
    changed = [name for name, value in given.items() if value is not None and value != []]
    shaped = traceable(entry, study.study.paths.cache / "assets")
    if task is not None and not changed and model in study.catalog.models:
        names = wanted(study, method, study.pairs().get((model, task), []))
        records = pair_costs(study, model, task, names, timed=out is None)
    elif shaped is not None:
        shape = study.catalog.tasks[task] if task else None
        size = batch or (shape.batch_size if shape else BATCH)
        length = seq or (shape.max_length if shape else SEQ)
        bench, methods = (
            Bench(shaped, device or "meta", name=model, profile=loop),
            study.catalog.methods,
        )
        records = [
            bench.cost(name, methods[name], size, length, task=task)
            for name in track(wanted(study, method), f"tracing {model}")
        ]
    elif changed:
        raise UserError(
            f"model '{model}' is measured on a task's own batches, on the CPU: "
            f"{', '.join(changed)} would change nothing"
        )
    else:
        raise UserError(f"model '{model}' is measured on data: name its --task")
    hand_out(records, out, as_json, lambda: show(records))


def hand_out(
    records: Sequence[Strict], out: Path | None, as_json: bool, show: Callable[[], None]
) -> None:
    """Write records for the workflow if it asks, and show them: as JSON, or as a table."""
    from costbp.cost.record import write_costs

    if out is not None:
        write_costs(out, records)
    if as_json:
        print(json.dumps([record.model_dump(mode="json") for record in records], indent=2))
    else:
        show()


def model_entry(study: Plan, name: str, settings: Sequence[str] | None) -> ModelEntry:
    """The entry of a name, or of a configuration file, with ``settings`` laid over it."""
    from costbp.cost.bench import entry_from_config

    path = Path(name)
    if name not in study.catalog.models and (path.suffix == ".json" or path.is_dir()):
        entry = entry_from_config(path)
    else:
        known(study, "models", name)
        entry = study.catalog.models[name]
    given = {ALIASES.get(key, key): value for key, value in parsed(settings or ()).items()}
    return overlaid(entry, given, "--set") if given else entry


def profiled(
    study: Plan, name: str | None, settings: Sequence[str] | None
) -> tuple[Profile | None, list[str]]:
    """The profile of a name with the settings that are its own (`profile.foreach=true`), and the rest."""
    own = [s for s in settings or () if s.startswith(OF_PROFILES)]
    rest = [s for s in settings or () if s not in own]
    if name is None:
        if own:
            raise UserError(f"--set {own[0]}: names no --profile that it is a setting of")
        return None, rest
    known(study, "profiles", name)
    given = {key.removeprefix(OF_PROFILES): value for key, value in parsed(own).items()}
    profile = study.catalog.profiles[name]
    return overlaid(profile, given, "--set") if given else profile, rest


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """Values by key.

    Raises:
        UserError: one is not KEY=VALUE.
    """
    given = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting}: wants KEY=VALUE, as lora.r=8")
        given[key] = yaml.safe_load(text)
    return given


def wanted(study: Plan, text: str, default: Sequence[str] = ()) -> list[str]:
    """The methods that a comma-separated list names, each once; by default the study's."""
    names = [name.strip() for name in text.split(",") if name.strip()] or list(default)
    names = names or list(dict.fromkeys(cell.method for cell in study.cells()))
    for name in names:
        known(study, "methods", name)
    return list(dict.fromkeys(names))


def show(records: Sequence[CostRecord]) -> None:
    """A table of costs, with a bar of the bytes at the peak."""
    from costbp.analysis.tables import mib, si

    most = max(record.beyond for record in records)
    rows = [
        (
            r.method,
            f"{r.forward_units:.2f}",
            "-" if r.closed_form is None else f"{r.closed_form:.3g}",
            si(r.flops),
            "-" if r.time is None else f"{r.time:.1f}",
            mib(r.beyond),
            bar({k: v for k, v in r.peak_by_category.items() if k != "weights"}, most),
        )
        for r in records
    ]
    first = records[0]
    title = (
        f"{first.model}, batch {first.batch} x {first.seq}, on {first.device}; weights "
        f"{mib(first.weights_bytes)}, trained {first.d:,}"
    )
    head = ("method", "forward units", "closed form", "FLOPs", "time, forwards", "peak beyond")
    table(title, (*head, "what it is for"), rows)


@app.command()
def fit(
    memory: Annotated[
        str, typer.Option(help="Of the card, as 24GB; comma-separated for several; GB means GiB.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Name in models.yaml or a `config.json`; default: which models fit at all.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-M", help="Comma-separated; default: the usual ones.")
    ] = "bp_vanilla,bp_selective,bp_checkpointing,fmad_vanilla,fmad_multiple,zo_vanilla",
    batch: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = BATCH,
    seq: Annotated[int, typer.Option(min=2, help="Tokens an example.")] = SEQ,
    reserve: Annotated[str, typer.Option(help="What driver and others take.")] = "0.5GB",
    profile: Profiled = None,
    lengths: Annotated[bool, typer.Option(help="Search the largest length, too.")] = True,
    settings: Settings = None,
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What fits on a card: each method's largest batch and length, its cost, the cheapest BP plan.

    Without --model: which of the catalog's models each method can train at all. Bytes are those
    of a trace without weights (`costbp cost`); fragmentation is not among them.
    """
    from costbp.models.libraries import with_transformers

    with with_transformers():
        from costbp.cost.bench import Bench
        from costbp.cost.fit import Fitting, models_that_fit
        from costbp.cost.pairs import traceable

    study = load(config, plan)
    names = wanted(study, method)
    methods = {name: study.catalog.methods[name] for name in names}
    reserved = bytes_of("reserve", reserve)
    limits = {card: bytes_of("memory", card) - reserved for card in memory.split(",")}
    shape = (batch, seq)
    if model is None:
        models = sized(study)
        needs = models_that_fit(
            {n: models[n] for n in track(list(models), "tracing models")}, methods, shape
        )
        hand_out(needs, out, as_json, lambda: show_models(needs, names, limits, shape))
        return
    entry = model_entry(study, model, settings)
    entry = traceable(entry, study.study.paths.cache / "assets") or entry
    search = Fitting(Bench(entry, name=model), methods)
    fits = [
        search.fit(name, card, limit, shape, lengths)
        for name in track(names, f"fitting {model}")
        for card, limit in limits.items()
    ]
    hand_out(fits, out, as_json, lambda: show_fits(study, fits, limits))


def show_fits(study: Plan, fits: Sequence[Fit], limits: Mapping[str, int]) -> None:
    """What each method can do on each card, and the cheapest backpropagation that fits."""
    from costbp.cost.fit import cheapest_plan

    def number(value: int | None) -> str:
        return "not searched" if value is None else f"{value:,}" if value else "none fits"

    for card, limit in limits.items():
        rows = [fit for fit in fits if fit.memory == card]
        words = [
            (
                row.method,
                f"{row.units:.2f}",
                f"{row.bytes / 2**30:.2f}" + ("" if row.bytes <= limit else "  does not fit"),
                number(row.batch),
                number(row.length),
            )
            for row in rows
        ]
        batch, seq = rows[0].wanted_batch, rows[0].seq
        head = ("method", "forward units", f"GiB at {batch} x {seq}")
        most = (f"largest batch at {seq} tokens", f"largest length at batch {batch}")
        title = f"{rows[0].model} in {card}, {limit / 2**30:.1f} GiB of it free"
        table(title, (*head, *most), words)
        best = cheapest_plan(study, rows, limit)
        print(
            "no backpropagation plan fits"
            if best is None
            else f"cheapest backpropagation that fits: {best.method}, {best.units:.2f} forward units"
        )


def show_models(
    needs: Sequence[Needs],
    names: Sequence[str],
    limits: Mapping[str, int],
    shape: tuple[int, int],
) -> None:
    """GiB of a step of each method on each model; in brackets where it exceeds the card."""
    for card, limit in limits.items():
        words = []
        for row in needs:
            sizes = (row.bytes[name] for name in names)
            shown = (f"{n / 2**30:.2f}" if n <= limit else f"({n / 2**30:.2f})" for n in sizes)
            words.append((row.model, f"{row.parameters / 1e9:.2f} G", *shown))
        title = f"GiB at batch {shape[0]} x {shape[1]}; in brackets what exceeds {card}"
        table(title, ("model", "parameters", *names), words)


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help="Name under `costs.sweeps` in the study.")],
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Cost against batch, length, rank, depth, directions: one key at a time, without weights."""
    from costbp.analysis.tables import mib
    from costbp.cost.sweep import run_sweep

    study = load(config, plan)
    records = list(run_sweep(study, name))
    rows = [(str(r.value), r.method, f"{r.forward_units:.2f}", mib(r.beyond)) for r in records]
    head = ("value", "method", "forward units", "peak beyond")
    title = f"{name}: {records[0].model}"
    hand_out(records, out, as_json, lambda: table(title, head, rows))


@app.command()
def costs(config: Config = None, plan: Frozen = None) -> None:
    """Draw the page of costs at full size from what has been traced (`snakemake costs`)."""
    from costbp.analysis.costs import write

    study = load(config, plan)
    folder = study.study.paths.reports / "costs"
    write(study, folder)
    print(folder / "index.html")


def bytes_of(option: str, text: str) -> int:
    """An option's memory in bytes."""
    try:
        return card_bytes(text)
    except ValueError as error:
        raise UserError(f"--{option} {text}: {error}") from error


def sized(study: Plan) -> Mapping[str, ModelEntry]:
    """The catalog's models that can be traced at full size."""
    models = study.catalog.models
    return {name: m for name, m in models.items() if isinstance(m.source, ConfigSource)}
