"""Which device a job may use: on a machine with several GPUs each job takes a free one.

Snakemake counts GPUs but hands out no numbers. A lock file a device, held for the life of the
process and released by the kernel however it ends, is enough. Where a scheduler or the user has
already chosen (CUDA_VISIBLE_DEVICES), that choice stands.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from costbp.errors import UserError
from costbp.files import lock

POLL_SECONDS = 1.0


@contextlib.contextmanager
def device_slot(wanted: str, folder: Path) -> Iterator[torch.device]:
    """Hold a device for the block.

    Args:
        wanted: "auto", "cpu" or "cuda".
        folder: where lock files live; shared by the jobs of one machine.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    available = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not available:
        raise UserError("device = cuda, but torch sees no CUDA device; set device to cpu or auto")
    if not available:
        yield torch.device("cpu")
    elif os.environ.get("CUDA_VISIBLE_DEVICES"):
        yield torch.device("cuda", 0)
    else:
        with first_free(available, folder) as index:
            yield torch.device("cuda", index)


@contextlib.contextmanager
def first_free(count: int, folder: Path) -> Iterator[int]:
    """Number of a free slot out of ``count``, held for the block; waits until there is one."""
    host = os.uname().nodename
    while True:
        for index in range(count):
            with lock(folder / f"{host}-{index}.lock", wait=False) as held:
                if held:
                    yield index
                    return
        time.sleep(POLL_SECONDS)
