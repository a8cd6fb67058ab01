"""JAX's jvp on an equal stack of blocks: an outside reference for forward units.

JAX drops products with symbolic zeros, as our rules do in torch. The same stack (attention with
LoRA on queries and values, two linear layers, layer norms) is written in both, from the same
numbers, so derivatives are compared too. XLA counts elementwise FLOPs as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench import FORWARD, KEY, Bench, Case, Size, interleaved
from benchmarks.rows import FLOPS, Cost
from costbp.estimators.directions import Gaussian
from costbp.estimators.oracles import Exact
from costbp.estimators.projected import Projected
from costbp.objective import Batch, Objective

K = 8
TRAINED = ("qa", "qb", "va", "vb")
Weights = dict[str, Any]


class Block(nn.Module):
    """A pre-norm transformer block without biases; LoRA of rank 1 on queries and values."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        shapes |= {"up": (4 * hidden, hidden), "down": (hidden, 4 * hidden)}
        shapes |= {"qa": (1, hidden), "qb": (hidden, 1), "va": (1, hidden), "vb": (hidden, 1)}
        self.w = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(shape) / math.sqrt(shape[1]), name in TRAINED)
                for name, shape in shapes.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        w, (n, length, hidden) = self.w, x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, length, self.heads, -1).transpose(1, 2)

        y = F.layer_norm(x, (hidden,))
        q = F.linear(y, w["q"]) + F.linear(F.linear(y, w["qa"]), w["qb"])
        v = F.linear(y, w["v"]) + F.linear(F.linear(y, w["va"]), w["vb"])
        q, k, v = split(q), split(F.linear(y, w["k"])), split(v)
        scores = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)
        x = x + F.linear((scores @ v).transpose(1, 2).reshape(n, length, hidden), w["o"])
        y = F.layer_norm(x, (hidden,))
        return x + F.linear(F.gelu(F.linear(y, w["up"])), w["down"])


class Stack(nn.Module):
    """Blocks, called with a batch."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(size.hidden, size.heads) for _ in range(size.layers))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["features"]
        for block in self.blocks:
            x = block(x)
        return x


def mean_square(output: Tensor, batch: Batch) -> Tensor:
    """Loss []."""
    return output.square().mean()


def _stack_in_jax(heads: int) -> Callable[[list[Weights], list[Weights], Any], Any]:
    """The loss of ``Stack`` in JAX, of (trained, frozen, features)."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def block(w: Weights, x: Any) -> Any:
        n, length, hidden = x.shape

        def split(y: Any) -> Any:
            return y.reshape(n, length, heads, -1).transpose(0, 2, 1, 3)

        y = norm(x)
        q = y @ w["q"].T + (y @ w["qa"].T) @ w["qb"].T
        v = y @ w["v"].T + (y @ w["va"].T) @ w["vb"].T
        q, k, v = split(q), split(y @ w["k"].T), split(v)
        scores = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]), -1)
        x = x + (scores @ v).transpose(0, 2, 1, 3).reshape(n, length, hidden) @ w["o"].T
        up = jax.nn.gelu(norm(x) @ w["up"].T, approximate=False)
        return x + up @ w["down"].T

    def loss(trained: list[Weights], frozen: list[Weights], x: Any) -> Any:
        for a, b in zip(trained, frozen, strict=True):
            x = block(a | b, x)
        return jnp.square(x).mean()

    return loss


def jax_block(bench: Bench) -> None:
    """Units of JAX and of ours on the same stack, and whether both derivatives agree."""
    try:
        import jax
    except ImportError:
        bench.results.notes.append("jax: skipped, not installed (pip install 'costbp[bench]')")
        return
    size = bench.size
    rows, length = size.shapes[0]
    objective = Objective(Stack(size).to(bench.device), mean_square)
    features = torch.randn(rows, length, size.hidden, device=bench.device)
    case = Case("equal stack", rows, length, objective, {"features": features})
    directions = Gaussian().draw(objective, KEY, K)
    ours = {
        f"FmAD K={count}": case.estimate(Projected(Exact(), Gaussian(), count)) for count in (1, K)
    }
    measured = bench.measure("jax", case, ours, {})

    loss = _stack_in_jax(size.heads)
    trained, frozen = _weights(objective, objective.theta)
    tangents = [_weights(objective, row)[0] for row in directions.dense]
    stacked = jax.tree.map(lambda *parts: jax.numpy.stack(parts), *tangents)
    x = jax.numpy.asarray(features.cpu().numpy())

    def derivative(t: Any, w: Any, f: Any, x: Any) -> Any:
        return jax.jvp(lambda w: loss(w, f, x), (w,), (t,))

    many = jax.vmap(derivative, in_axes=(0, None, None, None), out_axes=(None, 0))
    compiled = {
        FORWARD: (loss, (trained, frozen, x)),
        "JAX jvp K=1": (derivative, (tangents[0], trained, frozen, x)),
        f"JAX vmap(jvp) K={K}": (many, (stacked, trained, frozen, x)),
    }
    programs = {n: (jax.jit(f).lower(*a).compile(), a) for n, (f, a) in compiled.items()}
    flops = {name: float(p.cost_analysis()["flops"]) for name, (p, _) in programs.items()}
    rounds = interleaved(
        {name: partial(_finish, *program) for name, program in programs.items()},
        size.seconds,
        size.least,
        "cpu",
    )
    for name in list(programs)[1:]:
        units = flops[name] / flops[FORWARD]
        bench.results.costs.append(
            Cost("jax", case.label, name, True, units, rounds.ratio(name), None)
        )
        bench.check(name, FLOPS, "flops", case.label, units, None)
    for name in ours:
        bench.check(f"{name} as JAX's", FLOPS, "flops", case.label, measured.units(name), None)
    program, arguments = programs[f"JAX vmap(jvp) K={K}"]
    theirs = torch.tensor([float(slope) for slope in program(*arguments)[1]])
    slopes = Exact()(objective, case.batch, directions)[1].cpu()
    error = float((slopes - theirs).norm() / theirs.norm())
    bench.check(f"FmAD K={K} as JAX's", "error of derivatives", "value", case.label, error, 1e-4)


def _finish(program: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import jax

    jax.block_until_ready(program(*arguments))


def _weights(objective: Objective, theta: Tensor) -> tuple[list[Weights], list[Weights]]:
    """Trained weights, taken from the flat ``theta``, and frozen ones, per block for JAX."""
    import jax.numpy as jnp

    module = objective.module
    assert isinstance(module, Stack)
    trained: list[Weights] = [{} for _ in module.blocks]
    frozen: list[Weights] = [{} for _ in module.blocks]
    for name, p in module.named_parameters():
        _, place, _, weight = name.split(".")
        if name in objective.slices:
            start, stop, shape = objective.slices[name]
            value, where = theta[start:stop].view(shape), trained
        else:
            value, where = p, frozen
        where[int(place)][weight] = jnp.asarray(value.detach().cpu().numpy())
    return trained, frozen
