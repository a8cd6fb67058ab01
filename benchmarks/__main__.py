"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.entries import ENTRIES
from benchmarks.output import machine, print_costs, print_targets, save
from costbp.console import say

app = typer.Typer(pretty_exceptions_enable=False)
FOLDER = Path(__file__).parent / "results"


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Entry to run; repeatable: {', '.join(ENTRIES)}.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes; times are not judged.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    strict: Annotated[bool, typer.Option(help="Let missed times fail the run too.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, targets.md and costs.png.")
    ] = FOLDER,
) -> None:
    """Measure the estimators against their floors and against what people use today.

    Exits with 1 if a target for FLOPs, memory or values is missed.
    """
    unknown = set(only or ()) - set(ENTRIES)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--only")
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    bench = Bench(QUICK if quick else FULL, device)
    for name in only or ENTRIES:
        start = time.perf_counter()
        ENTRIES[name](bench)
        say(f"{name}: {time.perf_counter() - start:.0f} s")
    results = bench.results
    print_costs(results)
    print_targets(results)
    for note in results.notes:
        print(note)
    save(results, out, machine(device))
    say(f"written to {out}")
    raise typer.Exit(1 if results.misses(strict) else 0)


if __name__ == "__main__":
    app()
