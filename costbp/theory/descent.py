"""What a projected estimate does to gradient descent, in closed form.

With K Gaussian directions and exact derivatives E[g_hat^T H g_hat] = (1 + 1/K) g^T H g + (tr H / K) |g|^2,
at most (1 + (r + 1) / K) L |g|^2 with L the largest curvature and r = tr H / L, the effective rank
(MeZO, arXiv 2305.17333, Theorem 1). Where nothing is known of H, r is bounded by d.
"""

from __future__ import annotations


def slow_down(dimensions: float, count: int) -> float:
    """1 + (n + 1) / K for n = d or n = r: how many times the largest stable rate falls, and the steps
    to a loss grow, against exact gradients. Exact for the rate where all curvatures are equal."""
    return 1 + (dimensions + 1) / count


def effective_rank(trace: float, largest: float) -> float:
    """tr H / |H|: d where all curvatures are equal, 1 where a single one is not zero."""
    return trace / largest


def participation(trace: float, square: float) -> float:
    """(tr H)^2 / tr H^2, the same measure with less weight on the largest curvature."""
    return trace**2 / square


def masked_error(kept: int, share: float, count: int) -> float:
    """E|g_hat - g|^2 / |g|^2 of K Gaussian directions on ``kept`` entries that hold ``share`` of |g|^2:
    what is not seen is a bias, the rest has the error of d = ``kept``."""
    return 1 - share + share * (kept + 1) / count
