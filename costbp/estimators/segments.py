"""Several consecutive blocks recomputed as one, though the model calls them one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from costbp.device import random_state, randomness_from


class Segment:
    """Stores the first block's input only; the backward pass runs the blocks again, each with its
    own arguments.

    torch's ``checkpoint`` wraps one function. Here the model's own loop calls the blocks, so the
    segment listens: activations that a block saves are replaced by their number, and the first
    one that the backward pass asks for makes the segment run again and collect them all. A block
    whose first argument isn't what the block before returned starts a chain of its own.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = list(blocks)
        self._chain: _Chain | None = None

    def forward_of(self, block: nn.Module) -> Callable[..., Any]:
        """The forward that stands in for ``block``'s own."""
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if self._chain is None or block is self.blocks[0] or args[0] is not self._chain.end:
                self._chain = _Chain(args[0])
            chain = self._chain
            result = chain.run(forward, args[1:], kwargs)
            if block is self.blocks[-1]:
                chain.end = self._chain = None
            return result

        return run


class _Chain:
    """Blocks of a segment that feed each other."""

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.end: Tensor | None = None
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self.saved: list[Tensor | None] | None = None
        self.count = self.asked = 0
        self.random = random_state(start.device)

    def run(self, forward: Callable[..., Any], rest: tuple[Any, ...], kwargs: Any) -> Any:
        """One block's forward; what it saves is dropped."""
        entry = self.start if self.end is None else self.end
        self.calls.append((forward, rest, kwargs))
        with saved_tensors_hooks(self._drop, self._recomputed):
            result = forward(entry, *rest, **kwargs)
        self.end = _states(result)
        return result

    def _drop(self, tensor: Tensor) -> int:
        self.count += 1
        return self.count - 1

    def _recomputed(self, number: int) -> Tensor:
        if self.saved is None:
            self.saved = self._again()
        tensor, self.saved[number] = self.saved[number], None
        assert tensor is not None, "a saved activation was asked for twice"
        return tensor

    def _again(self) -> list[Tensor | None]:
        kept: list[Tensor | None] = []

        def keep(tensor: Tensor) -> None:
            kept.append(tensor.detach())  # this graph itself is never run backward

        entry = self.start.detach().requires_grad_(self.start.requires_grad)
        with (
            torch.enable_grad(),
            randomness_from(self.random, self.start.device),
            saved_tensors_hooks(keep, lambda nothing: nothing),
        ):
            for forward, rest, kwargs in self.calls:
                entry = _states(forward(entry, *rest, **kwargs))
        assert len(kept) == self.count, "a segment saved other activations when it ran again"
        return kept


def _states(result: Any) -> Tensor:
    """The hidden states among a block's results: the result itself or its first part."""
    states = result if isinstance(result, Tensor) else result[0]
    assert isinstance(states, Tensor)
    return states
