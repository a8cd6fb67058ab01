"""torch's caching allocator, replayed: what a GPU would hand out, and keep, for what was traced.

Live bytes are what tensors hold. The allocator rounds each to 512 bytes (*allocated*) and takes memory
from the driver in segments: of 2 MiB for tensors up to 1 MiB, of 20 MiB up to 10 MiB, of whole 2 MiB
beyond (*reserved*); a request takes the smallest free block that holds it, which is split if what is
left is large enough (c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from costbp.meter import Timeline

ROUND = 512
SMALL, SMALL_SEGMENT = 2**20, 2 * 2**20
MEDIUM, MEDIUM_SEGMENT = 10 * 2**20, 20 * 2**20
LARGE_ROUND = 2 * 2**20


@dataclass(eq=False)
class _Block:
    """A piece of a segment, and its neighbours there."""

    size: int
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class Allocator:
    """Counts what requests take.

    Attributes:
        allocated: bytes handed out now, rounded.
        reserved: bytes taken from the driver, which never get back.
        most: largest ``allocated`` so far.
    """

    allocated: int = 0
    reserved: int = 0
    most: int = 0
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    _number: int = 0

    def take(self, size: int) -> _Block:
        """A block of at least ``size`` bytes."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        blocks = self._free[small]
        place = bisect.bisect_left(blocks, (size, 0))
        if place < len(blocks):
            block = blocks.pop(place)[2]
        else:
            block = _Block(_segment(size), small)
            self.reserved += block.size
        block.free = False
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = _Block(left, small, before=block, after=block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.after, block.size = rest, size
            self._keep(rest)
        self.allocated += block.size
        self.most = max(self.most, self.allocated)
        return block

    def give(self, block: _Block) -> None:
        """Take a block back, joined with free neighbours."""
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            block = self._joined(block.before, block)
        if block.after is not None and block.after.free:
            self._drop(block.after)
            block = self._joined(block, block.after, known=True)
        self._keep(block)

    def _joined(self, left: _Block, right: _Block, known: bool = False) -> _Block:
        if not known:
            self._drop(left)
        left.size += right.size
        left.after = right.after
        if left.after is not None:
            left.after.before = left
        return left

    def _keep(self, block: _Block) -> None:
        block.free = True
        self._number += 1
        bisect.insort(self._free[block.small], (block.size, self._number, block))

    def _drop(self, block: _Block) -> None:
        blocks = self._free[block.small]
        place = bisect.bisect_left(blocks, (block.size, 0))
        while blocks[place][2] is not block:
            place += 1
        del blocks[place]


def _segment(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MEDIUM:
        return MEDIUM_SEGMENT
    return -(-size // LARGE_ROUND) * LARGE_ROUND


def replayed(resident: Iterable[int], timeline: Timeline | None) -> tuple[int, int]:
    """Bytes allocated at most, and reserved, where ``resident`` tensors are made first and a step
    of this timeline is run twice: the second finds the first one's free blocks."""
    allocator = Allocator()
    for size in resident:
        allocator.take(size)
    if timeline is None:
        return allocator.most, allocator.reserved
    sizes, last = timeline.sizes.astype(int).tolist(), len(timeline.sizes) - 1
    going: dict[int, list[int]] = {}
    for number, died in enumerate(timeline.died.tolist()):
        going.setdefault(died, []).append(number)
    for _ in range(2):
        held = {}
        for number, size in enumerate(sizes):
            held[number] = allocator.take(size)
            for gone in going.get(number, ()) if number < last else list(held):
                allocator.give(held.pop(gone))
    return allocator.most, allocator.reserved
