"""Which activations backpropagation keeps, which it computes again, and where it keeps them."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from costbp.config.shares import fewest_inputs
from costbp.errors import UserError
from costbp.estimators.replay import Pass
from costbp.meter import Meter, counted
from costbp.objective import Batch, Objective

MemoryPlan = Callable[[Objective, Batch], contextlib.AbstractContextManager[None]]

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


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
def keep_all(objective: Objective, batch: Batch) -> Iterator[None]:
    """Store every activation: the fastest plan and the largest."""
    yield


@contextlib.contextmanager
def recomputing(chosen: Sequence[nn.Module], **options: Any) -> Iterator[None]:
    """Store the inputs of the ``chosen`` blocks and run each again in the backward pass, with its
    own positional and keyword arguments, since masks differ by layer in some families."""
    with contextlib.ExitStack() as stack:
        for block in chosen:
            block.forward = _checkpointed(block.forward, options)  # shadows the class's method
            stack.callback(block.__dict__.pop, "forward", None)
        yield


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(forward, **kwargs)
        return checkpoint(bound, *args, use_reentrant=False, **options)

    return run


def per_block(objective: Objective, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Recompute each block but the last (Chen et al. 2016, arXiv 1604.06174), whose activations
    are needed first, so that recomputing them would save nothing at the peak. A module that is
    its own single block is recomputed whole; a lone linear layer stores nothing but its input, so
    there nothing is to do."""
    found = blocks(objective.module)
    return recomputing(found[:-1] if len(found) > 1 else found)


def selective(objective: Objective, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Keep the results of matrix products inside each block and recompute the rest, which is cheap
    (Korthikanti et al. 2022, arXiv 2205.05198, in spirit)."""

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = function in PRODUCTS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return recomputing(blocks(objective.module), context_fn=contexts)


@contextlib.contextmanager
def offload(objective: Objective, batch: Batch) -> Iterator[None]:
    """Move saved activations to host memory and back; parameters stay. A trace forgets them.

    Raises:
        UserError: the model is on the CPU, where there is nowhere to move them.
    """
    if objective.theta.device.type == "cpu":
        raise UserError(
            "plan offload: the model is on the CPU, where activations have nowhere to go; allowed "
            f"there: {', '.join(name for name in PLANS if name != 'offload')}, byte_budget"
        )
    module = objective.module
    kept = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type == "cpu" or tensor.untyped_storage()._cdata in kept:
            return tensor
        if tensor.is_meta:
            return functools.partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="meta")
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return functools.partial(host.to, tensor.device, non_blocking=True)

    def unpack(packed: Any) -> Tensor:
        found: Tensor = packed if isinstance(packed, Tensor) else packed()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(frozen=True)
class Keeping:
    """Store the activations of the last ``count`` blocks and recompute the others."""

    count: int

    def __call__(
        self, objective: Objective, batch: Batch
    ) -> contextlib.AbstractContextManager[None]:
        found = blocks(objective.module)
        return recomputing(found[: len(found) - self.count])


def towers(module: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a model by class: those of one follow each other."""
    return [list(alike) for _, alike in itertools.groupby(blocks(module), type)]


@dataclass(frozen=True)
class SubLayers:
    """Recompute every block, and of it no more at once than its attention or its feed-forward part.

    Per-block checkpointing peaks where all that a block saves exists, beside the inputs of all blocks.
    Here the backward pass runs a block twice: first for what the feed-forward part saves, then, up to
    the end of attention, for the rest (sub-layers as in MeSP, arXiv 2602.13069). And of the blocks'
    inputs no more than ``inputs`` exist at a time, those of groups that begin at a kept one; the
    others come from one more forward pass of the group. With groups of n, n - 1, ..., 1 blocks, the
    last of them dealt with first, n kept inputs do for n (n + 1) / 2 blocks. An input that the model
    changes between two blocks is kept.

    Attributes:
        inputs: at most so many in each tower; None: as few as one more forward pass allows.
    """

    inputs: int | None = None

    @contextlib.contextmanager
    def __call__(self, objective: Objective, batch: Batch) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for tower in towers(objective.module):
                begins = _begins(len(tower), self.inputs or fewest_inputs(len(tower)))
                latest: list[Any] = [lambda: None]
                for place, block in enumerate(tower):
                    run, end = _by_parts(block.forward, latest, keeps=place in begins)
                    attention = _attention(block)
                    if attention is not None:
                        stack.callback(attention.register_forward_hook(end).remove)
                    block.forward = run  # shadows the class's method
                    stack.callback(block.__dict__.pop, "forward", None)
            yield


def _attention(block: nn.Module) -> nn.Module | None:
    """The first of a block's children that hold linear layers: attention, in transformers."""
    for child in filter(_has_linear, block.children()):
        return _attention(child) if isinstance(child, nn.ModuleList) else child
    return None


def _begins(count: int, inputs: int) -> set[int]:
    """Where groups of at most ``inputs``, ``inputs - 1``, ... blocks begin: as many as there may be,
    and the first the longest."""
    if inputs < fewest_inputs(count):
        raise UserError(
            f"plan sub_layer: inputs = {inputs} is too few for {count} blocks; "
            f"allowed: {fewest_inputs(count)} or more"
        )
    found, place, more = set(), 0, count - min(inputs, count)
    for size in range(inputs, 0, -1):
        if place < count:
            found.add(place)
        place += 1 + min(size - 1, more)
        more -= min(size - 1, more)
    return found


def _by_parts(
    forward: Callable[..., Any], latest: list[Any], *, keeps: bool
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """A block's forward pass whose saved tensors are computed again by parts, and what ends a part.
    ``latest`` refers to the pass of the block before."""
    now: list[Pass] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        made = Pass(forward, args, kwargs, None if keeps else latest[0]())
        latest[0] = weakref.ref(made)
        now.append(made)
        try:
            return made.first(args, kwargs)
        finally:
            now.pop()

    def end(*_: Any) -> None:
        if now:  # not when it is run again
            now[-1].cut()

    return run, end


class ByteBudget:
    """Keep as many blocks as fit: the peak beyond weights of one estimate stays within a budget.

    The last blocks are kept, whose activations live shortest. How many is found by bisection over
    metered steps, once per shape of batch, so the budget holds exactly (by live storage).

    Raises:
        UserError: even with every block recomputed the step needs more.
    """

    def __init__(self, mebibytes: float) -> None:
        self.bytes = int(mebibytes * 2**20)
        self._kept: dict[tuple[Any, ...], int] = {}

    def __call__(
        self, objective: Objective, batch: Batch
    ) -> contextlib.AbstractContextManager[None]:
        found = blocks(objective.module)
        shape = tuple(tuple(tensor.shape) for tensor in batch.values())
        if shape not in self._kept:
            self._kept[shape] = self._most(objective, batch, found)
        return Keeping(self._kept[shape])(objective, batch)

    def __deepcopy__(self, memo: Any) -> ByteBudget:
        return self  # what was found depends on shapes alone

    def _most(self, objective: Objective, batch: Batch, found: Sequence[nn.Module]) -> int:
        least = 0

        def fits(recomputed: int) -> bool:
            nonlocal least
            least = self._peak(objective, batch, found[:recomputed])
            return least <= self.bytes

        recomputed = bisect.bisect_left(range(len(found) + 1), True, key=fits)
        if recomputed > len(found):
            raise UserError(
                f"plan byte_budget: {self.bytes / 2**20:g} MiB are too few; with every block "
                f"recomputed a step needs {least / 2**20:.1f} MiB beyond weights"
            )
        return len(found) - recomputed

    @staticmethod
    def _peak(objective: Objective, batch: Batch, chosen: Sequence[nn.Module]) -> int:
        existing = [*objective.existing(), *batch.values()]
        with counted(0), recomputing(chosen), Meter(existing) as meter:
            objective.gradient(batch)
        return meter.peak


PLANS: dict[str, MemoryPlan] = {
    "none": keep_all,
    "per_block": per_block,
    "selective": selective,
    "sub_layer": SubLayers(),
    "offload": offload,
}
