"""What the workflow has made and is no longer as it was: found before it plans its jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from costbp.assets.fetch import damage
from costbp.config.study import Plan
from costbp.console import say
from costbp.files import intact
from costbp.train.record import RECORD, STEPS

SAID = 5  # lines at most


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
