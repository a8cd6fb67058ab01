"""`costbp doctor`: what a study needs and what of it is missing here; whether a GPU computes right."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from costbp.cli.app import Config, app, ask_hub, load
from costbp.config.catalog import AssetEntry, Fetchable, LocalData
from costbp.config.sources import AssetSource
from costbp.config.study import Plan
from costbp.console import say, table
from costbp.errors import UserError, suggest
from costbp.tasks.base import load_task

GIB = 2**30
Sizes = dict[str, int | UserError | None]


class Finding(NamedTuple):
    """One thing that a study needs."""

    what: str
    state: str  # "ok", "to fetch", "missing", "wrong", "note"
    remark: str


@app.command()
def doctor(
    config: Config = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Trace what each method of the study needs (minutes).")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Try every method on this device (cuda, cpu) instead; under five minutes."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="With --device: what was found, to attach to an issue.")
    ] = Path("reports/doctor.json"),
) -> None:
    """Tell what a study needs and what is missing: packages, GPU, hub access, disk, downloads, and
    whether your own files can be read.

    With --memory: the GiB of each method's step, traced without weights. With --device: whether
    this machine's GPU computes what the CPU does, with random weights and without the hub.
    """
    if device is not None:
        try_device(load(config, None), device, out)
        return
    ask_hub()
    plan = load(config, None)
    sizes = to_fetch(plan)
    found = [*packages(plan), gpu(plan), *downloads(plan, sizes), disk(plan, sizes), *files(plan)]
    table(f"study {plan.name}", ("needs", "state", ""), found)
    if memory:
        show_memory(plan)
    missing = [finding for finding in found if finding.state in ("missing", "wrong")]
    if missing:
        raise UserError(f"study '{plan.name}': {len(missing)} of its needs are not met here", 1)
    print(f"study '{plan.name}' can run here")


def show_memory(plan: Plan) -> None:
    """A table of what each method's step needs, a row a model and shape of batch."""
    from costbp.cost.pairs import memory_needs

    rows = []
    for name, needs in memory_needs(plan):
        known = {method: size for method, size in needs.items() if size is not None}
        words = [
            f"{method} {size / GIB:.2f}" for method, size in sorted(known.items(), key=_second)
        ]
        rows.append((name, ", ".join(words) or "not traced: weights and batches decide"))
        say(f"traced {name}")
    table("GiB at the peak of a step, weights included", ("model, batch x tokens", "methods"), rows)


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def try_device(plan: Plan, name: str, out: Path) -> None:
    """Run the checks of a device, show them, and write them down.

    Raises:
        UserError: there is no such device, or a check failed.
    """
    import torch

    from costbp.device import name_of
    from costbp.device_pool import device_slot
    from costbp.files import write_text
    from costbp.train.record import environment
    from costbp.train.selftest import as_json, checks

    if name not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: {suggest(name, ('cuda', 'cpu'))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {no_cuda()}")
    with device_slot(name) as device:
        about = environment(name_of(device)) | {"driver": str(driver()), "cuda": toolkit()}
        found = []
        for check in checks(device, plan.catalog.methods):
            say(f"{check.what}: {check.state}")
            found.append(check)
    table(about["device"], ("check", "state", ""), [(c.what, c.state, c.remark) for c in found])
    write_text(out, as_json(found, about))
    print(out)
    if failed := [check.what for check in found if check.state == "failed"]:
        raise UserError(f"{about['device']}: {len(failed)} checks failed: {', '.join(failed)}", 1)


def driver() -> str | None:
    """Version of the NVIDIA driver, None where none answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if not done.returncode and lines else None


def toolkit() -> str:
    """The CUDA that torch was built with, or that it was built without."""
    import torch

    version: str | None = torch.version.cuda
    return "none, a CPU build" if version is None else version


def no_cuda() -> str:
    """Why torch sees no GPU, as far as driver and toolkit tell."""
    found = driver()
    if found is None:
        return (
            f"torch sees no CUDA device, and no NVIDIA driver answers (torch's CUDA: {toolkit()})"
        )
    return (
        f"torch sees no CUDA device: driver {found}, torch's CUDA {toolkit()}. An older driver needs "
        "an older CUDA build of torch: choose it with PyTorch's installation selector, install it "
        "first, then this package"
    )


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
        source = plan.catalog.models[name].base
        if isinstance(source, AssetSource) and source.gguf:
            needed |= dict.fromkeys(("gguf", "sentencepiece"), "pip install gguf sentencepiece")
        if source is not None and source.bits is not None and source.packing == "nf4":
            needed["bitsandbytes"] = "pip install -e '.[gpu]'"
    for package, remark in needed.items():
        installed = find_spec(package) is not None
        state = "ok" if installed else "missing"
        yield Finding(f"package {package}", state, "" if installed else remark)


def gpu(plan: Plan) -> Finding:
    """The GPU that the study's jobs ask for."""
    import torch

    wanted = plan.study.device == "cuda" or plan.study.resources.gpu > 0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        remark = f"{torch.cuda.get_device_name()}, {gib(free)} of {gib(total)} free"
        return Finding("GPU", "ok", f"{remark}; driver {driver()}, torch's CUDA {toolkit()}")
    if wanted:
        return Finding("GPU", "missing", no_cuda())
    return Finding("GPU", "note", f"none; runs on {os.cpu_count()} CPU cores")


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


def _size(what: Fetchable) -> int | None:
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


def files(plan: Plan) -> Iterator[Finding]:
    """What the tasks find that read files of this machine, rows by class, or why they can't."""
    from costbp.data.sources import read_examples
    from costbp.data.splits import content, split

    for name in dict.fromkeys(task for _, task in plan.pairs()):
        task = plan.catalog.tasks[name]
        if not isinstance(task.data, LocalData):
            continue
        try:
            found, empty = read_examples(task, name, plan.study.paths.cache / "assets")
            split(found, task, name)
        except UserError as error:
            yield Finding(f"data of {name}", "wrong", str(error))
            continue
        said = []
        for part, examples in found.items():
            counts = Counter(example.answer for example in examples)
            classes = [f"{answer} {counts[answer]:,}" for answer in load_task(task.loader).names]
            said.append(f"{part or 'rows'} {len(examples):,} ({', '.join(classes) or 'free text'})")
        items = [{content(example) for example in part} for part in found.values()]
        shared = sum(map(len, items)) - len(set().union(*items))
        again = sum(map(len, found.values())) - sum(map(len, items))
        notes = {"without text, left out": empty, "given twice, kept once": again}
        notes["in two splits, left out of train"] = shared
        said += [f"{count:,} {what}" for what, count in notes.items() if count]
        yield Finding(f"data of {name}", "ok", "; ".join(said))


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
