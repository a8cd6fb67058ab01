"""`costbp doctor`: what a study needs, and what of it is missing here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from costbp.cli.app import Config, app, ask_hub, load
from costbp.config.catalog import AssetEntry, AssetSource
from costbp.config.study import Fetched, Plan
from costbp.console import table
from costbp.errors import UserError

GIB = 2**30
Sizes = dict[str, int | UserError | None]


class Finding(NamedTuple):
    """One thing that a study needs."""

    what: str
    state: str  # "ok", "to fetch", "missing", "note"
    remark: str


@app.command()
def doctor(config: Config = None) -> None:
    """Tell what a study needs and what is missing: packages, GPU, hub access, disk, downloads."""
    ask_hub()
    plan = load(config, None)
    sizes = to_fetch(plan)
    found = [*packages(plan), device(plan), *downloads(plan, sizes), disk(plan, sizes)]
    table(f"study {plan.name}", ("needs", "state", ""), found)
    missing = [finding for finding in found if finding.state == "missing"]
    if missing:
        raise UserError(f"study '{plan.name}': {len(missing)} of its needs are not met here", 1)
    print(f"study '{plan.name}' can run here")


def to_fetch(plan: Plan) -> Sizes:
    """Bytes of what is not there yet, None where unknown, or why it can't be fetched."""
    from costbp.assets.fetch import damage

    found: Sizes = {}
    for name, what in plan.assets().items():
        if damage(plan.study.paths.cache / "assets" / name, what) is not None:
            try:
                found[name] = _size(what)
            except UserError as error:
                found[name] = error
    return found


def packages(plan: Plan) -> Iterator[Finding]:
    """Libraries that only some models need."""
    needed: dict[str, str] = {}
    for name in dict.fromkeys(model for model, _ in plan.pairs()):
        source = plan.catalog.models[name].source
        if isinstance(source, AssetSource) and source.gguf:
            needed |= dict.fromkeys(("gguf", "sentencepiece"), "pip install gguf sentencepiece")
        if source.bits is not None and source.packing == "nf4":
            needed["bitsandbytes"] = "pip install -e '.[gpu]'"
    for package, remark in needed.items():
        there = find_spec(package) is not None
        yield Finding(f"package {package}", "ok" if there else "missing", "" if there else remark)


def device(plan: Plan) -> Finding:
    """The GPU that the study's jobs ask for."""
    import torch

    wanted = plan.study.device == "cuda" or plan.study.resources.gpu > 0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        remark = f"{torch.cuda.get_device_name()}, {gib(free)} of {gib(total)} free"
        return Finding("GPU", "ok", remark)
    cores = f"{os.cpu_count()} CPU cores"
    if wanted:
        return Finding("GPU", "missing", f"torch sees no CUDA device; {cores}")
    return Finding("GPU", "note", f"none; runs on {cores}")


def downloads(plan: Plan, sizes: Sizes) -> Iterator[Finding]:
    """Each thing that is fetched, and how large it is."""
    for name in plan.assets():
        size = sizes.get(name)
        if name not in sizes:
            yield Finding(name, "ok", "fetched")
        elif isinstance(size, UserError):
            yield Finding(name, "missing", str(size))
        else:
            yield Finding(name, "to fetch", "size unknown" if size is None else gib(size))


def _size(what: Fetched) -> int | None:
    if isinstance(what, AssetEntry):
        return what.size
    from costbp.assets.hub import size_of

    return size_of(what)


def disk(plan: Plan, sizes: Sizes) -> Finding:
    """Room for what is still to be fetched."""
    cache = plan.study.paths.cache.absolute()
    wanted = sum(size for size in sizes.values() if isinstance(size, int))
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    state = "ok" if free > 1.1 * wanted + GIB else "missing"
    return Finding("disk", state, f"{gib(wanted)} to download, {gib(free)} free")


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
