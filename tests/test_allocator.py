"""The replay of torch's caching allocator, against sequences worked out by hand from its rules."""

import random

import numpy as np
import pytest

from costbp.cost.allocator import Allocator, replayed
from costbp.meter import Timeline

MIB = 2**20


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left is no more than 1 MiB: not split
    ],
)
def test_first_request(size: int, allocated: int, reserved: int) -> None:
    allocator = Allocator()
    allocator.take(size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_small_tensors_share_a_segment_and_large_ones_do_not() -> None:
    allocator = Allocator()
    for _ in range(4):
        allocator.take(MIB // 2)
    assert allocator.reserved == 2 * MIB
    allocator.take(MIB // 2)
    assert allocator.reserved == 4 * MIB


def test_the_smallest_free_block_that_holds_a_request_is_taken() -> None:
    allocator = Allocator()
    large, small = allocator.take(64 * MIB), allocator.take(32 * MIB)
    allocator.give(large)
    allocator.give(small)
    assert allocator.take(30 * MIB) is small
    assert allocator.reserved == 96 * MIB
    allocator.take(40 * MIB)
    allocator.take(24 * MIB)  # what is left of the first
    assert allocator.reserved == 96 * MIB


def test_neighbours_are_joined() -> None:
    allocator = Allocator()
    whole = allocator.take(60 * MIB)
    allocator.give(whole)
    parts = [allocator.take(20 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.give(part)
    allocator.take(60 * MIB)
    assert allocator.reserved == 60 * MIB
    assert allocator.allocated == 60 * MIB


def test_nothing_is_handed_out_twice_or_lost() -> None:
    draw, allocator, held = random.Random(0), Allocator(), []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            allocator.give(held.pop(draw.randrange(len(held))))
        else:
            held.append(allocator.take(draw.randrange(1, 40 * MIB)))
        assert allocator.allocated == sum(block.size for block in held) <= allocator.reserved
    for block in held:
        allocator.give(block)
    free = sum(size for blocks in allocator._free.values() for size, _, _ in blocks)
    assert allocator.allocated == 0
    assert free == allocator.reserved


def test_a_step_is_replayed_with_its_deaths() -> None:
    sizes = np.array([64.0, 32.0, 64.0]) * MIB
    most, reserved = replayed([16 * MIB], Timeline(sizes, np.array([1, 2, 2]), np.zeros(3, int)))
    assert most == (16 + 64 + 32) * MIB  # the third takes the first one's place
    assert reserved == most
