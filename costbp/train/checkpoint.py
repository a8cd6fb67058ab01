"""A run's state as a file: used only where all of it is as it was written."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from costbp.files import atomic

FORMAT = 1  # raised when what a checkpoint holds, or what that means, changes


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a state of tensors, numbers, texts and containers of them."""
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, "parts": parts(state), "state": state}, temporary)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What ``save`` wrote, on ``device``.

    Raises:
        Exception: of any kind, where the file is damaged, of another format or changed by hand.
    """
    with zipfile.ZipFile(path) as archive:  # checksums, which torch writes and does not compare
        if (member := archive.testzip()) is not None:
            raise ValueError(f"{member} is damaged")
    saved = torch.load(path, map_location=device, weights_only=True)
    if (found := saved.get("format", 0)) != FORMAT:
        raise ValueError(f"it has format {found}, and this version reads format {FORMAT}")
    state: dict[str, Any] = saved["state"]
    if saved["parts"] != parts(state):
        raise ValueError("a part of it is missing or has another shape")
    return state


def parts(state: Any) -> Any:
    """What a state is made of: names, types and shapes in place of values."""
    if isinstance(state, torch.Tensor):
        return f"{state.dtype} {tuple(state.shape)}"
    if isinstance(state, Mapping):
        return {name: parts(part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return [len(state), *map(parts, state[:1])]
    return type(state).__name__
