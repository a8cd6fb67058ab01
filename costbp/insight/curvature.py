"""The Hessian's spectrum by Lanczos, from products with vectors alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from costbp.estimators.directions import signs
from costbp.insight.problems import Bench
from costbp.objective import Key
from costbp.theory.descent import effective_rank, participation

PROBES = 16  # of stochastic Lanczos quadrature
ORDER = 24  # products a probe


@dataclass(frozen=True)
class Spectrum:
    """Of the Hessian's positive part H+, the least that bounds it from above: |H+|, the largest Ritz
    value of all probes; tr H+ and tr H+^2, an estimate for each probe."""

    largest: float
    traces: list[float]
    squares: list[float]

    @property
    def rows(self) -> dict[str, list[float]]:
        """What is shown of it, by name, an estimate for each probe."""
        square = sum(self.squares) / len(self.squares)
        return {
            "largest": [self.largest],
            "trace": self.traces,
            "effective rank": [effective_rank(trace, self.largest) for trace in self.traces],
            "participation": [participation(trace, square) for trace in self.traces],
        }


def hessian(bench: Bench) -> Callable[[Tensor], Tensor]:
    """v -> H v [d] at the start, by differentiating the gradient's graph, which is built once."""
    theta = bench.home.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's gradient has no derivative
        loss = bench.objective.at(theta, bench.batch)
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(slope, theta, v, retain_graph=True)[0]

    return product


def spectrum(bench: Bench, seed: int) -> Spectrum:
    """Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017): from each of ``PROBES`` vectors of
    signs, as many nodes as Lanczos takes steps, at most ``ORDER`` and d."""
    product = hessian(bench)
    largest, traces, squares = 0.0, [], []
    for probe in range(PROBES):
        generator = Key(seed, probe).generator()
        start = signs(bench.d, generator, bench.home.device, torch.float64)
        values, weights = lanczos(lambda v: product(v.to(bench.home)).double(), start)
        values = values.clamp(min=0)
        largest = max(largest, float(values.max()))
        traces.append(float(weights @ values))
        squares.append(float(weights @ values.square()))
    return Spectrum(largest, traces, squares)


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values [n] of a symmetric matrix, and the weights [n] with which a function's values there
    sum to start^T f(H) start. Every vector is made orthogonal to all before it, twice."""
    norm = start.norm()
    basis, diagonal, beside = [start / norm], [], []
    for _ in range(min(ORDER, len(start))):
        v = product(basis[-1])
        diagonal.append(basis[-1] @ v)
        frame = torch.stack(basis)
        for _ in range(2):
            v = v - frame.T @ (frame @ v)
        beside.append(v.norm())
        if beside[-1] <= 1e-6 * diagonal[0].abs():  # the space is exhausted
            break
        basis.append(v / beside[-1])
    size = len(diagonal)
    band = torch.stack(beside)[: size - 1]
    matrix = torch.diag(torch.stack(diagonal)) + torch.diag(band, 1) + torch.diag(band, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, norm.square() * vectors[0].square()
