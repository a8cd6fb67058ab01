"""What a device tells: its memory, its allocator's peaks, and when its work is done."""

from __future__ import annotations

import gc
from typing import Any

import torch

from costbp.objective import Batch

HOST = ("cpu", "meta")  # no memory and no queue of their own
NO_ROOM = ("can't allocate memory", "ALLOC_FAILED", "out of memory")


def memory_of(device: torch.device) -> int | None:
    """Bytes of a device's own memory; None for a CPU, whose memory is the machine's."""
    return None if device.type in HOST else int(_module(device).mem_get_info(device)[1])


def name_of(device: torch.device) -> str:
    """A device's name for people."""
    return device.type if device.type in HOST else str(_module(device).get_device_name(device))


def synchronise(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type not in HOST:
        _module(device).synchronize(device)


def free(device: torch.device | None) -> None:
    """Give back what a finished run left in the allocator."""
    gc.collect()
    if device is not None and device.type not in HOST:
        _module(device).empty_cache()


def forget_peaks(device: torch.device) -> None:
    """Let the allocator's peaks begin anew."""
    if device.type not in HOST:
        _module(device).reset_peak_memory_stats(device)


def allocator_peaks(device: torch.device) -> tuple[int, int]:
    """Largest allocated and reserved bytes since ``forget_peaks``, as the allocator tells; zeros
    for a CPU."""
    if device.type in HOST:
        return 0, 0
    module = _module(device)
    return int(module.max_memory_allocated(device)), int(module.max_memory_reserved(device))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; copied while the host goes on."""
    if device.type == "cpu":
        return batch
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine had no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_ROOM)
