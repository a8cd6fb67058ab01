"""Which activations backpropagation keeps, and which it computes again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

MemoryPlan = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: members of the outermost ``ModuleList``s of one class that
    hold linear layers (right for encoders, decoders, and both towers of a vision-language model).
    A module without such lists is its own single block."""
    found: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            members = list(child) if isinstance(child, nn.ModuleList) else []
            if len({type(m) for m in members}) == 1 and _has_linear(members[0]):
                found.extend(members)
            else:
                visit(child)

    visit(module)
    return found or [module]


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())


@contextlib.contextmanager
def keep_all(module: nn.Module) -> Iterator[None]:
    """Store every activation: the fastest plan and the largest."""
    yield


@contextlib.contextmanager
def per_block(module: nn.Module) -> Iterator[None]:
    """Store only block inputs and run each block again in the backward pass (Chen et al. 2016,
    arXiv 1604.06174). The last block is kept: its activations are needed first, so recomputing it
    would save nothing at the peak. A module that is its own single block is
    recomputed whole; a lone linear layer stores nothing but its input, so there nothing is to do.

    Each block is replayed with its own positional and keyword arguments, since masks differ by
    layer in some families.
    """
    found = blocks(module)
    recomputed = found[:-1] if len(found) > 1 else found
    with contextlib.ExitStack() as stack:
        for block in recomputed:
            _recompute(block, stack)
        yield


def _recompute(block: nn.Module, stack: contextlib.ExitStack) -> None:
    forward = block.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = checkpointed  # an instance attribute shadows the class's method
    stack.callback(block.__dict__.pop, "forward", None)


PLANS: dict[str, MemoryPlan] = {"none": keep_all, "per_block": per_block}
