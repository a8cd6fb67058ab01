"""What the workflow has made and is no longer as it was: found before it plans its jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from costbp.assets.fetch import damage
from costbp.config.study import Plan
from costbp.console import say
from costbp.files import intact
from costbp.train.record import RECORD, STEPS

SAID = 5  # lines at most
SKEW = 60  # seconds that machines of a cluster may differ


def damaged(plan: Plan) -> Iterator[tuple[Path, str]]:
    """The workflow's outputs that have to be made again, and why: sealed ones that have changed,
    manifests of training whose runs are gone or damaged, those of assets that have changed."""
    changed = set()
    reports = plan.study.paths.reports.glob(".*.sha256")  # claims; the rest only people read
    for seal in (*plan.results.rglob(".*.sha256"), *reports):
        path = seal.with_name(seal.name[1:].removesuffix(".sha256"))
        if path.exists() and not intact(path):
            changed.add(path)
            yield path, "it has changed since it was written"
    for model, task, budget, methods in plan.jobs():
        path = plan.results / "train" / model / task / budget / f"{'+'.join(methods)}.json"
        if path not in changed and path.exists() and (why := _lost(path, plan.study.paths.store)):
            yield path, why
    for name, asset in plan.assets(insight=True).items():
        path = plan.results / "assets" / f"{name}.json"
        folder = plan.study.paths.cache / "assets" / name
        wrong = damage(folder, asset, lately=True) if folder.exists() else None
        if wrong and path.exists() and path not in changed:
            yield path, f"{folder}: {wrong}"


def _lost(manifest: Path, store: Path) -> str:
    """What is wrong with the first run of a manifest that isn't as it was, or nothing."""
    try:
        folders = [store / run["folder"] for run in json.loads(manifest.read_bytes())["runs"]]
    except (ValueError, KeyError, TypeError):
        return "it can't be read"
    for folder in folders:
        if not (folder / RECORD).exists():
            return f"{folder} has no record"
        if not (folder / STEPS).exists() or not intact(folder / RECORD):
            return f"{folder} is damaged"
    return ""


def found_damaged(plan: Plan) -> list[str]:
    """The outputs that have to be made again, told a line each."""
    found = list(damaged(plan))
    for path, why in found[:SAID]:
        say(f"{path} is made again: {why}")
    if len(found) > SAID:
        say(f"and {len(found) - SAID} more")
    return [str(path) for path, _ in found]


def bring_back(plan: Plan) -> None:
    """Give outputs of the future, made before the clock was set back, the present time, their order
    kept. What is made now would else be older than what it is made from, which Snakemake refuses."""
    folders, now = (plan.results, plan.study.paths.reports), time.time_ns()
    late = now + SKEW * 10**9
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    future = sorted((t, p) for p in files if (t := p.stat().st_mtime_ns) > late)
    for place, (_, path) in enumerate(future):
        os.utime(path, ns=(now, now - 1000 * (len(future) - place)))
    if future:
        say(
            f"{len(future)} files of {' and '.join(map(str, folders))} were of the future: clock set back?"
        )
