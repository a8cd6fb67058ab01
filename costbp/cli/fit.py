"""`costbp fit`: what fits on a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from costbp.cli.app import Config, Frozen, Out, app, load
from costbp.cli.cost import (
    BATCH,
    SEQ,
    CardName,
    Json,
    Profiled,
    Settings,
    hand_out,
    known_card,
    model_entry,
    profiled,
    wanted,
)
from costbp.config.catalog import ModelEntry
from costbp.config.costs import card_bytes
from costbp.config.sources import ConfigSource
from costbp.config.study import Plan
from costbp.console import table, track
from costbp.errors import UserError

if TYPE_CHECKING:
    from costbp.cost.record import Fit, Needs

GIB = 2**30
CONTEXT = (0.3, 1.31)  # GiB of a driver's context: ours of a recent card; HF's docs, of a V100


@app.command()
def fit(
    memory: Annotated[
        str, typer.Option(help="Of the card, as 24GB; comma-separated for several; GB means GiB.")
    ] = "",
    card: CardName = None,
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
    ] = "bp_vanilla,bp_selective,bp_checkpointing,bp_sublayer,fmad_vanilla,fmad_multiple,zo_vanilla",
    batch: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = BATCH,
    seq: Annotated[int, typer.Option(min=2, help="Tokens an example.")] = SEQ,
    reserve: Annotated[
        str, typer.Option(help="What the driver's context, the allocator and others take.")
    ] = "1.3GB",
    profile: Profiled = None,
    lengths: Annotated[bool, typer.Option(help="Search the largest length, too.")] = True,
    settings: Settings = None,
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What fits on a card: each method's largest batch and length, its cost, the cheapest BP plan.

    Without --model: which of the catalog's models each method can train at all. Bytes are those that are
    alive in a trace without weights (`costbp cost`); what a GPU's allocator makes of them stands beside,
    and a driver's context comes on top.
    """
    from costbp.models.libraries import with_transformers

    with with_transformers():
        from costbp.cost.bench import Bench
        from costbp.cost.fit import Fitting, fits, models_that_fit
        from costbp.cost.pairs import traceable

    study = load(config, plan)
    names = wanted(study, method)
    methods = {name: study.catalog.methods[name] for name in names}
    reserved = bytes_of("reserve", reserve)
    sizes = [*filter(None, memory.split(","))]
    if card is not None:
        sizes.append(f"{known_card(card).memory}GB")
    if not sizes:
        raise UserError("name the card's --memory, as 24GB, or its --card")
    limits = {size: bytes_of("memory", size) - reserved for size in sizes}
    if small := [size for size, limit in limits.items() if limit <= 0]:
        raise UserError(f"--memory {small[0]}: --reserve {reserve} leaves nothing of it")
    shape = (batch, seq)
    if model is None and profile is not None:
        raise UserError("--profile: name the --model that its loop trains")
    if model is None:
        models = sized(study)
        needs = models_that_fit(
            {n: models[n] for n in track(list(models), "tracing models")}, methods, shape
        )
        hand_out(needs, out, as_json, lambda: show_models(needs, names, limits, shape))
        return
    loop, settings = profiled(study, profile, settings)
    entry = model_entry(study, model, settings)
    entry = traceable(entry, study.study.paths.cache / "assets") or entry
    search = Fitting(Bench(entry, name=model, profile=loop), methods)
    found = fits(search, limits, shape, lengths)
    told = zip(track(names, f"fitting {model}"), found, strict=True)
    every = [fit for _, some in told for fit in some]
    hand_out(every, out, as_json, lambda: show_fits(study, every, limits))


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
                f"{row.bytes / GIB:.2f}" + ("" if row.bytes <= limit else "  does not fit"),
                f"{row.allocated / GIB:.2f}",
                f"{row.allocated / GIB + CONTEXT[0]:.1f} to {row.reserved / GIB + CONTEXT[1]:.1f}",
                number(row.batch),
                number(row.length),
            )
            for row in rows
        ]
        batch, seq = rows[0].wanted_batch, rows[0].seq
        sizes = (f"GiB alive at {batch} x {seq}", "allocated", "with context, reserved")
        head = ("method", "forward units", *sizes)
        most = (f"largest batch at {seq} tokens", f"largest length at batch {batch}")
        title = f"{rows[0].model} in {card}, {limit / GIB:.1f} GiB of it free"
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
            shown = (f"{n / GIB:.2f}" if n <= limit else f"({n / GIB:.2f})" for n in sizes)
            words.append((row.model, f"{row.parameters / 1e9:.2f} G", *shown))
        title = f"GiB at batch {shape[0]} x {shape[1]}; in brackets what exceeds {card}"
        table(title, ("model", "parameters", *names), words)


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
