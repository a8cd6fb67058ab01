"""Sources of directions. Each is scaled so that E[z z^T] = I, which makes (g . z) z unbiased."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from costbp.objective import Key

DirectionSource = Callable[[Tensor, Key], Tensor]


def gaussian(like: Tensor, key: Key) -> Tensor:
    """z ~ N(0, I), [d], of ``like``'s dtype and device, drawn in float32 so that the draw does not
    depend on the dtype.

    The mean of K estimates has E|g_hat|^2 = (1 + (d + 1) / K) |g|^2.
    """
    generator = key.generator(like.device)
    z = torch.randn(like.numel(), generator=generator, device=like.device, dtype=torch.float32)
    return z.to(like.dtype)


DIRECTIONS: dict[str, DirectionSource] = {"gaussian": gaussian}
