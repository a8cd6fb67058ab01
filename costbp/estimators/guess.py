"""Forward gradients along guessed directions: each block's own local loss proposes one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from costbp.estimators.base import Estimate, Estimator, Way, wide
from costbp.estimators.directions import Directions
from costbp.estimators.memory_plans import blocks
from costbp.estimators.oracles import Oracle
from costbp.objective import Batch, Key, Objective, Piece


@dataclass
class LocalGuess(Estimator):
    """g_hat = sum_b (df/dz_b) z_b: the gradient's projection on one guessed direction per block
    (Fournier et al. 2023, "Can Forward Gradient Match Backpropagation?").

    Block b's guess is the gradient, with respect to the block's own parameters, of a local loss
    that looks at the block's output; normalised. Backpropagation stays within one block, so that
    one block's activations are alive at a time. Ours: the local loss is the model's own loss with
    the later blocks skipped, which needs no auxiliary network; parameters outside of blocks (a
    head) take the last block's pass, whose gradient for them is exact. Biased: what is orthogonal
    to every guess is lost. A model that is a single block gets its exact gradient.

    Cost with L blocks and adapters: about 2 forward units for the guesses and 1 + L + 1 for the
    derivatives.
    """

    oracle: Oracle

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        found = blocks(objective.module)
        group_of = _groups(objective, found)
        with objective.noise(key):
            guess = self._guess(objective, batch, found, group_of)
            used = sorted({group_of[name] for name in objective.slices})
            directions = _by_group(objective, guess, group_of, used)
            loss, derivatives = self.oracle(objective, batch, directions)
        usable = torch.isfinite(derivatives)
        gradient = directions.combine(torch.where(usable, derivatives, 0))
        return Estimate(gradient, loss, derivatives)

    def ways(self, objective: Objective) -> list[Way]:
        """Those of its oracle, on whole batches alone: a block's guess looks at the hidden states of
        the batch that the pass before has left."""
        count = len(set(_groups(objective, blocks(objective.module)).values()))
        ways = self.oracle.ways(count)
        return [Way(text, cost, replace(self, oracle=oracle)) for text, cost, oracle in ways]

    @staticmethod
    def _guess(
        objective: Objective,
        batch: Batch,
        found: Sequence[nn.Module],
        group_of: dict[str, int],
    ) -> Tensor:
        guess = wide(torch.zeros_like(objective.theta))
        relay = _Relay(found)
        last = len(found) - 1
        for active in range(len(found)):
            wanted = {active, len(found)} if active == last else {active}
            mine = [name for name in objective.slices if group_of[name] in wanted]
            with relay.only(active), torch.set_grad_enabled(bool(mine)):
                if not mine:  # only its hidden states are needed
                    objective.value(batch)
                    continue
                _, gradient = objective.gradient(batch)
            for name in mine:
                start, stop, _ = objective.slices[name]
                guess[start:stop] = gradient[start:stop]
        return guess


def _groups(objective: Objective, found: Sequence[nn.Module]) -> dict[str, int]:
    """Trainable parameter -> index of its block; len(found) for those outside of all blocks."""
    owner = {id(p): index for index, block in enumerate(found) for p in block.parameters()}
    named = dict(objective.module.named_parameters())
    return {name: owner.get(id(named[name]), len(found)) for name in objective.slices}


def _by_group(
    objective: Objective, guess: Tensor, group_of: dict[str, int], used: Sequence[int]
) -> Directions:
    squares = dict.fromkeys(used, guess.new_zeros(()))
    for name, (start, stop, _) in objective.slices.items():
        squares[group_of[name]] = squares[group_of[name]] + guess[start:stop].square().sum()
    least = torch.finfo(guess.dtype).tiny  # a group without any gradient has no direction

    def part(k: int, piece: Piece) -> Tensor:
        own = guess[piece.entries]
        if group_of[piece.name] != used[k]:
            return torch.zeros_like(own)
        return own / squares[used[k]].clamp_min(least).sqrt()

    return Directions(objective, len(used), part)


class _Relay:
    """Runs a model with one block active: the blocks before it hand on the hidden states of an
    earlier pass, the blocks after it do nothing. Where blocks of another class come first (the
    vision tower of Qwen2-VL), those run, without a graph."""

    def __init__(self, found: Sequence[nn.Module]) -> None:
        self.found = found
        self.states: Tensor | None = None  # what the active block receives; None: its own input
        self.extra: tuple[Any, ...] | None = None  # what a block returns beside hidden states

    @contextlib.contextmanager
    def only(self, active: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            kind = type(self.found[active])
            if active and kind is not type(self.found[active - 1]):
                self.states = self.extra = None
            for index, block in enumerate(self.found):
                if index == active:
                    run = self._run(block.forward)
                elif index < active and type(block) is not kind:
                    run = torch.no_grad()(block.forward)
                else:
                    run = self._skip
                block.forward = run
                stack.callback(block.__dict__.pop, "forward", None)
            yield

    def _run(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = forward(states if self.states is None else self.states, *args, **kwargs)
            self.extra = result[1:] if isinstance(result, tuple) else None
            self.states = (result[0] if isinstance(result, tuple) else result).detach()
            return result

        return run

    def _skip(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return states if self.extra is None else (states, *self.extra)
