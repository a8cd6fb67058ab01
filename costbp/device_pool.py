"""Which device a job may use: each takes a free one.

Snakemake counts GPUs but hands out no numbers. A lock file a device, named by the device's own id,
held for the life of the process and released by the kernel however it ends, is enough.
A job takes one device of those that CUDA_VISIBLE_DEVICES names, inside a scheduler's job too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from costbp.errors import UserError
from costbp.files import lock

POLL_SECONDS = 1.0
LOCKS = Path("/tmp") / f"costbp-gpus-{os.getuid()}"  # one place a machine, whatever TMPDIR says


@contextlib.contextmanager
def device_slot(wanted: str, folder: Path = LOCKS) -> Iterator[torch.device]:
    """Hold a device for the block, as the process' current one.

    Args:
        wanted: "auto", "cpu" or "cuda".
        folder: where lock files live; shared by all jobs of a machine.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    names = visible() if wanted != "cpu" else []
    if wanted == "cuda" and not names:
        raise UserError("device = cuda, but torch sees no CUDA device; set device to cpu or auto")
    if not names:
        yield torch.device("cpu")
        return
    with first_free(names, folder) as index:
        torch.cuda.set_device(index)  # everything that names no device means this one
        yield torch.device("cuda", index)


def visible() -> list[str]:
    """Ids of the devices that torch sees, by its numbers: a device's UUID or, of a part of one
    (MIG), the part's name."""
    tokens = [t.strip() for t in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    names = []
    for index in range(torch.cuda.device_count()):
        token = tokens[index] if index < len(tokens) else ""
        facts = torch.cuda.get_device_properties(index)
        names.append(token if token.startswith("MIG-") else str(getattr(facts, "uuid", index)))
    return names


@contextlib.contextmanager
def first_free(names: Sequence[str], folder: Path) -> Iterator[int]:
    """Index of a free one of the devices, held for the block; waits until there is one."""
    host = os.uname().nodename
    while True:
        for index, name in enumerate(names):
            file = f"{host}-{name.replace('/', '-')}.lock"
            with lock(folder / file, wait=False) as held:
                if held:
                    yield index
                    return
        time.sleep(POLL_SECONDS)


def largest_memory(wanted: str) -> int | None:
    """Bytes of the largest device that a job could get, without taking it."""
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    found = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    return max(found, default=None)
