"""Commands that hold theory against measurements: ``measure`` and ``insight``."""

from __future__ import annotations

from typing import Annotated

import typer

from costbp.cli.app import Config, Frozen, Out, app, load


@app.command()
def measure(
    problem: Annotated[str, typer.Argument(help="Name under `insight.problems` in the study.")],
    config: Config = None,
    plan: Frozen = None,
    out: Out = None,
) -> None:
    """Measure estimates, stable rates and curvature on a problem of the study's `insight`."""
    from costbp.cost.record import write_costs
    from costbp.insight.measure import measure
    from costbp.insight.points import path_of

    study = load(config, plan)
    points = list(measure(study, problem))
    path = out or path_of(study, problem)
    write_costs(path, points)
    print(f"{path}: {len(points)} points")


@app.command()
def insight(config: Config = None, plan: Frozen = None) -> None:
    """Draw what was measured beside what theory predicts (`snakemake insight` measures it first)."""
    from costbp.insight.page import write

    study = load(config, plan)
    folder = study.study.paths.reports / "insight"
    write(study, folder)
    print(folder / "index.html")
