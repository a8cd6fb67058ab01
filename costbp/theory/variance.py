"""Variance of projected estimates in closed form, for exact derivatives.

S = E|g_hat|^2 / |g|^2 for one direction; g_hat is unbiased, so S - 1 is its relative variance, and
the mean of K independent estimates has (S - 1) / K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian(d: int) -> float:
    """S = d + 2 (Nesterov and Spokoiny 2017)."""
    return d + 2.0


def fixed_length(d: int) -> float:
    """S = d for rademacher, sphere and coordinate directions, all of length sqrt(d)."""
    return float(d)


def relative_error(second_moment: float, count: int) -> float:
    """E|g_hat - g|^2 / |g|^2 of the mean of ``count`` independent estimates."""
    return (second_moment - 1) / count


def group_ratio(square: float, spread: float, batch: int, groups: int) -> float:
    """Error that directions add with K of their own in each of G equal groups of a batch, over what K
    shared ones add: (B / G |g|^2 + tr S) / (B |g|^2 + tr S), for B independent examples whose gradients
    have mean g (``square`` = |g|^2) and covariance S (``spread`` = tr S).

    Ours: directions add (S_z - 1) / K of the squared norm of the gradient they meet, S_z being the
    second moment of an isotropic source, and a mean over n examples has |g|^2 + tr S / n. From 1 / G
    where examples agree to 1 where they don't.
    """
    return (batch / groups * square + spread) / (batch * square + spread)


def frame_error(d: int, count: int) -> float:
    """E|g_hat - g|^2 / |g|^2 of ``count`` orthogonal (or distinct coordinate) directions:
    d / K - 1, which is zero at K = d."""
    return d / count - 1


def low_rank(gradients: Sequence[Tensor], rank: int) -> float:
    """S of Z = U V^T / sqrt(rank) on each matrix, Gaussian where a side is at most ``rank``.

    S = d + sum_s e_s |G_s|^2 / |g|^2 with e = 2 + 2 (m + n + 1) / rank for a matrix m x n and 2
    for Gaussian entries (our derivation from Wick pairings).
    """
    size = sum(g.numel() for g in gradients)
    square = sum(float(g.square().sum()) for g in gradients)
    extra = 0.0
    for g in gradients:
        small = g.ndim < 2 or min(g.shape) <= rank
        e = 2.0 if small else 2 + 2 * (sum(g.shape) + 1) / rank
        extra += e * float(g.square().sum()) / square
    return size + extra


def scaled(norms: Sequence[float], sizes: Sequence[int], scales: Sequence[float]) -> float:
    """S of directions scaled by s_j on group j: |s g|^2 sum_j(d_j / s_j^2) / |g|^2 + 2."""
    square = sum(norm**2 for norm in norms)
    shaped = sum((s * norm) ** 2 for s, norm in zip(scales, norms, strict=True))
    weight = sum(size / s**2 for s, size in zip(scales, sizes, strict=True))
    return shaped * weight / square + 2


def best_scaled(norms: Sequence[float], sizes: Sequence[int]) -> float:
    """S at the best scales, s_j^2 ~ sqrt(d_j) / |g_j|: (sum_j |g_j| sqrt(d_j))^2 / |g|^2 + 2."""
    square = sum(norm**2 for norm in norms)
    root = sum(norm * math.sqrt(size) for norm, size in zip(norms, sizes, strict=True))
    return root**2 / square + 2


def expected_cosine(d: int, count: int = 1) -> float:
    """About sqrt(K / (K + d + 1)), the cosine between the mean of K Gaussian estimates and g;
    sqrt(2 / (pi d)) is its exact limit for K = 1."""
    return math.sqrt(count / (count + d + 1)) if count > 1 else math.sqrt(2 / (math.pi * d))


@functools.cache
def extreme_of_squares(count: int, which: str) -> float:
    """Expectation of the largest or smallest of ``count`` squared N(0, 1) variables."""
    x = torch.linspace(0, 60, 600_001, dtype=torch.float64)
    below = torch.erf((x / 2).sqrt())
    tail = 1 - below**count if which == "largest" else (1 - below) ** count
    return float(torch.trapezoid(tail, x))


def best_eps(loss: float, third_derivative: float, unit_roundoff: float) -> float:
    """The step of a central difference whose error bound eps^2 |f'''| / 6 + u |f| / eps is least:
    (3 u |f| / |f'''|)^(1/3)."""
    return (3 * unit_roundoff * abs(loss) / abs(third_derivative)) ** (1 / 3)
