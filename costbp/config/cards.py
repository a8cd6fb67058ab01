"""What cards can do by what is published of them, and how long a step takes by that.

The roofline (Williams et al. 2009, doi 10.1145/1498765.1498785), operator by operator: an operator takes
as long as its FLOPs at the card's rate, or as its bytes at the card's bandwidth, whichever is longer,
and a launch. One share of each peak is reached; both are the same for all cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costbp.errors import UserError, suggest

Work = Mapping[tuple[bool, float, float], float]
"""How often operators ran, by whether they multiply in half precision, FLOPs and bytes moved."""

RATE = 0.7  # of the peak of matrix products; assumed, not fitted
BANDWIDTH = 0.6  # of the peak; assumed, too: docs/cost.md holds both against published times
LAUNCH = 5e-6  # seconds; assumed: what an empty kernel takes on CUDA


@dataclass(frozen=True)
class Card:
    """Published peaks, without sparsity.

    Attributes:
        half: FLOP/s of matrix products in bfloat16 or float16, accumulated in float32.
        single: the same in float32 (not TF32, which torch has to be asked for).
        bandwidth: of its memory, bytes/s.
        memory: as it is sold, in GiB.
        watts: under full load.
        source: where the figures are from.
    """

    half: float
    single: float
    bandwidth: float
    memory: int
    watts: float
    source: str

    def seconds(self, work: Work) -> float:
        """Predicted time of ``work``, one operator after the other."""
        total = 0.0
        for (half, flops, moved), count in work.items():
            multiplied = flops / (RATE * (self.half if half else self.single))
            total += count * (max(multiplied, moved / (BANDWIDTH * self.bandwidth)) + LAUNCH)
        return total


CARDS = {
    "a100": Card(312e12, 19.5e12, 2039e9, 80, 400, "NVIDIA A100 datasheet, 80GB SXM"),
    "a100_40gb": Card(312e12, 19.5e12, 1555e9, 40, 400, "NVIDIA A100 datasheet, 40GB SXM"),
    "h100": Card(989e12, 67e12, 3350e9, 80, 700, "NVIDIA H100 datasheet, SXM"),
    "l40s": Card(362e12, 91.6e12, 864e9, 48, 350, "NVIDIA L40S datasheet"),
    "4090": Card(165.2e12, 82.6e12, 1008e9, 24, 450, "NVIDIA Ada GPU architecture whitepaper"),
    "v100": Card(125e12, 15.7e12, 900e9, 16, 300, "NVIDIA V100 datasheet, SXM2"),
    "a10g": Card(70e12, 35e12, 600e9, 24, 300, "NVIDIA A10G datasheet"),
    "m2": Card(
        *(3.6e12, 3.6e12, 100e9, 24, 50),
        source="Apple on M2 (10 GPU cores, float32, bandwidth), Mac mini's largest power",
    ),
    "iphone15": Card(
        *(2.15e12, 2.15e12, 51.2e9, 8, 5),
        source="15 Pro, A17 Pro: not published by Apple; 6 x 128 lanes at 1.4 GHz, LPDDR5-6400, about 5 W",
    ),
}


def card(name: str) -> Card:
    """The card of a name.

    Raises:
        UserError: it isn't known.
    """
    if name not in CARDS:
        raise UserError(f"card '{name}' is unknown; {suggest(name, CARDS)}")
    return CARDS[name]
