"""Losses in float32 on a base that is held in half precision.

A difference of two losses lives on their last digits. In bfloat16 every product rounds its inputs to
eight bits, and a perturbation that is smaller than that drowns (docs/gpu.md has the measured curve).
Weights in half precision are exact in float32, so that each product's weight is widened for as long
as the product takes; activations are float32 throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from costbp.estimators.base import Difference

HALF = (torch.bfloat16, torch.float16)
WIDENED = ("linear", "layer_norm", "rms_norm")  # what computes with weights


def computing_in(difference: Difference) -> contextlib.AbstractContextManager[None]:
    """The precision in which a difference's losses are computed."""
    return float32_products() if difference.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Within the block linear layers, embeddings and norms compute and return float32 whatever
    their weights' dtype is. Packed layers unpack into their input's dtype, so they follow."""
    with contextlib.ExitStack() as stack:
        embedding = F.embedding
        found = {name: _widened(name, getattr(F, name)) for name in WIDENED}
        found["embedding"] = lambda *args, **kwargs: _wide(embedding(*args, **kwargs))
        for name, function in found.items():
            stack.enter_context(mock.patch.object(F, name, function))
        yield


def _widened(name: str, function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})

    return seen(name, run)  # a mode is to look at parameters as they are held


def seen(name: str, rule: Any) -> Any:
    """A rule of ours in place of an operator, which modes see before it by the operator's name."""

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(run, tensors, *args, **kwargs)
        return rule(*args, **kwargs)

    run.__name__ = name
    return run


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
