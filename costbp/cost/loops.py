"""A step of somebody's training loop, traced: what it keeps, and for how long, as its profile says.

The loop runs for real on meta, optimiser and all: tensors live as long as its variables hold them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costbp.config.methods import MethodEntry
from costbp.config.profiles import Profile
from costbp.cost.allocator import replayed
from costbp.cost.categories import GRADIENTS, Categories
from costbp.cost.step import StepCost, forward_only, frozen_bytes, seconds_by_card
from costbp.errors import UserError
from costbp.estimators.backprop import Backprop
from costbp.estimators.memory_plans import Keeping, MemoryPlan, per_block
from costbp.meter import Meter, Timeline
from costbp.objective import Batch, Objective

BLOCK = 256  # numbers of an 8-bit moment that share a scale (bitsandbytes)
LEAST = 4096  # numbers from which on a tensor's moments have 8 bits


@dataclass
class Loop:
    """A loop that trains an objective by backpropagation.

    Args:
        objective: whose gradient views it drops: gradients are made anew in each backward pass.
        plan: memory plan of the backward pass.
        profile: what it keeps.
        default: name of the method's own optimiser.
        cached: within the block copies of weights for mixed precision are made once.
    """

    objective: Objective
    plan: MemoryPlan
    profile: Profile
    default: str
    cached: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    trained: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        if self.profile.last_block == "recomputed" and self.plan is per_block:
            self.plan = Keeping(0)
        name = self.profile.optimizer or self.default
        self.trained = [p for p in self.objective.module.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.grad = None
        self.optimizers = _optimizers(name, self.trained, self.profile.foreach)
        self._in_backward = name.endswith("_in_backward")

    def run(self, batches: list[Batch], steps: int, meter: Meter) -> None:
        """``steps`` optimiser steps, each on all ``batches``; what is held from one to the next is
        let go at the end."""
        held = self.profile.keeps
        told = self._told(meter)
        hooks = [p.register_post_accumulate_grad_hook(told) for p in self.trained]
        try:
            for _ in range(steps):
                for batch in batches:
                    with self.plan(self.objective, batch):
                        with self.cached():
                            output = self.objective.module(batch)
                            loss = self.objective.loss(output, batch)
                        if held == "nothing":
                            del output
                        loss.backward()
                if not self._in_backward:
                    for optimizer in self.optimizers:
                        optimizer.step()
                if self.profile.gradients == "made":
                    for parameter in self.trained:
                        parameter.grad = None
                if held != "graph":
                    del loss
                    output = None
        finally:
            for hook in hooks:
                hook.remove()

    def _told(self, meter: Meter) -> Callable[[Tensor], None]:
        """Called with a parameter whose gradient is there."""
        owners = {
            id(p): optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }

        def tell(parameter: Tensor) -> None:
            assert parameter.grad is not None
            meter.mark(parameter.grad, GRADIENTS)
            if self._in_backward:
                owners[id(parameter)].step()
                parameter.grad = None

        return tell


Part = Literal["step", "forward", "perturb", "update", "weights"]


def loop_step(
    objective: Objective,
    method: MethodEntry,
    batch: Batch,
    profile: Profile,
    part: Part = "step",
    replay: bool = True,
) -> tuple[StepCost, Timeline]:
    """What a step of the profile's loop takes, and the storages that come and go in it.

    Args:
        part: of a step in place, or ``weights``: what is there before it.
        replay: say what a GPU's allocator would hand out and keep, too.

    Raises:
        UserError: the profile has no loop for the method.
    """
    if method.family not in profile.families:
        raise UserError(
            f"profile '{profile.label}' is a loop of {' and '.join(profile.families)} methods, and "
            f"'{method.label}' is one of {method.family}"
        )
    estimator = method.build()
    passes, steps, gradients = len(estimator.passes(1)), 1, 0
    states: list[Tensor] = []
    existing = [*objective.existing(), *batch.values()]
    with _precision(profile) as cached, _repeated(profile):
        with Meter(existing) as forward:
            forward_only(objective, batch)
        if profile.loop == "in_place":
            with Meter(existing) as meter, Categories(meter, objective):
                meter.work = {}
                _in_place(objective, batch, 2 * passes, method.optimizer.weight_decay, part)
        else:
            if not isinstance(estimator.per_batch, Backprop):
                raise UserError(
                    f"profile '{profile.label}' runs backpropagation under a memory plan, and "
                    f"'{method.label}' is an estimator of its own"
                )
            plan, default = estimator.per_batch.plan, method.optimizer.name
            loop = Loop(objective, plan, profile, default, cached)
            if part == "step":
                loop.run([batch] * passes, 1, Meter())
            states = [t for o in loop.optimizers for s in o.state.values() for t in s.values()]
            states = [tensor for tensor in states if isinstance(tensor, Tensor)]
            kept = [p.grad for p in loop.trained if p.grad is not None]
            steps = 2 if profile.keeps == "graph" else 1
            with Meter([*existing, *states, *kept]) as meter, Categories(meter, objective):
                meter.work = {}
                if part == "step":
                    loop.run([batch] * passes, steps, meter)
            gradients = sum(tensor.nbytes for tensor in kept)
            states += kept
    frozen = frozen_bytes(objective)
    state = sum(tensor.nbytes for tensor in states)
    weights = sum(frozen)
    resident = {"weights": weights, "adapters": objective.theta.nbytes, GRADIENTS: gradients}
    resident["optimiser state"] = state - gradients
    found = meter.at_peak()
    timeline = meter.timeline()
    sizes = [*frozen, objective.theta.nbytes, *(t.nbytes for t in states)]
    allocated, reserved = replayed(sizes, timeline) if replay else (None, None)
    cost = StepCost(
        forward_units=meter.flops / steps / forward.flops,
        flops=meter.flops / steps,
        forward_flops=forward.flops,
        peak_bytes=meter.peak,
        peak_by_category={n: resident.get(n, 0) + found.get(n, 0) for n in {**resident, **found}},
        weights_bytes=weights,
        state_bytes=objective.theta.nbytes + state,
        d=objective.d,
        seconds_by_card=seconds_by_card((1 / steps, meter.work or {})),
        allocated=allocated,
        reserved=reserved,
    )
    return cost, timeline


@torch.no_grad()
def _in_place(objective: Objective, batch: Batch, forwards: int, decay: float, part: Part) -> None:
    """A step of MeZO as its authors' trainer takes it: each parameter is moved by an expression whose
    every part is a tensor of its size (MeZO, large_models/trainer.py: `zo_perturb_parameters`,
    `zo_update`)."""
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    for _ in range(forwards if part != "update" else 0):
        for p in parameters if part in ("step", "perturb") else ():
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
            p.copy_(p + 1.0 * z * 1e-3)
        if part in ("step", "forward"):
            forward_only(objective, batch)
    for p in parameters if part in ("step", "update") else ():
        z = torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device)
        p.copy_(p - 1e-6 * (1.0 * z + decay * p))


# --- optimisers ------------------------------------------------------------------------------------


def _optimizers(
    name: str, parameters: list[nn.Parameter], foreach: bool
) -> list[torch.optim.Optimizer]:
    every: Any = {"foreach": foreach}
    if name == "adamw_in_backward":
        return [torch.optim.AdamW([p], **every) for p in parameters]
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(parameters, **every),
        "sgd": lambda: torch.optim.SGD(parameters, **every),
        "adafactor": lambda: torch.optim.Adafactor(parameters, foreach=False),
        "adamw_8bit": lambda: EightBit(parameters),
        "paged_adamw_8bit": lambda: EightBit(parameters, paged=True),
    }
    return [kinds[name]()]


class EightBit(torch.optim.Optimizer):
    """AdamW of bitsandbytes as it takes memory (Dettmers et al. 2022, arXiv 2110.02861): two moments of
    a byte a number, and a scale of four bytes for each 256; small tensors' moments are float32.

    Args:
        paged: moments are in memory that the driver moves to the host, outside of the allocator.
    """

    def __init__(self, parameters: list[nn.Parameter], paged: bool = False) -> None:
        super().__init__(parameters, {})
        self.paged = paged

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is None or self.paged or self.state[parameter]:
                continue
            state, count = self.state[parameter], parameter.numel()
            packed = count >= LEAST
            for moment in ("exp_avg", "exp_avg_sq"):
                dtype = torch.uint8 if packed else torch.float32
                state[moment] = torch.empty(count, dtype=dtype, device=parameter.device)
                if packed:
                    scales = -(-count // BLOCK)
                    state[f"{moment}_scales"] = torch.empty(scales, device=parameter.device)


# --- mixed precision -------------------------------------------------------------------------------

PRODUCTS: Any = (
    *((F, "linear"), (F, "scaled_dot_product_attention"), (F, "conv2d"), (torch, "matmul")),
    *((torch, "bmm"), (Tensor, "matmul"), (Tensor, "__matmul__")),
)
WIDE = ((F, "softmax"), (F, "layer_norm"), (F, "cross_entropy"), (Tensor, "softmax"))


@contextlib.contextmanager
def _repeated(profile: Profile) -> Iterator[None]:
    """Attention on keys and values that are copied for every head of queries, if the profile says so."""
    attention = F.scaled_dot_product_attention

    def repeated(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        times = query.shape[1] // key.shape[1]
        if times > 1:
            key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
        return attention(query, key, value, *args, **kwargs)

    patch = mock.patch.object(F, "scaled_dot_product_attention", repeated)
    with patch if profile.repeats else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _precision(
    profile: Profile,
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Products in the profile's dtype, norms, softmax and loss in float32, as `torch.autocast` does on
    a GPU; that has no meta device. Gives a context in which a weight's copy is made once: the graph holds
    it then, for its backward pass."""
    if profile.autocast is None:
        yield contextlib.nullcontext
        return
    copies: list[dict[int, Tensor]] = []

    def cast(value: Any, to: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == to:
            return value
        if not isinstance(value, nn.Parameter) or not copies:
            return value.to(to)
        if id(value) not in copies[-1]:
            copies[-1][id(value)] = value.to(to)
        return copies[-1][id(value)]

    def casting(function: Any, to: torch.dtype) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            args = tuple(cast(value, to) for value in args)
            return function(*args, **{name: cast(v, to) for name, v in kwargs.items()})

        return run

    @contextlib.contextmanager
    def cached() -> Iterator[None]:
        copies.append({})
        try:
            yield
        finally:
            copies.pop()

    half = getattr(torch, profile.autocast)
    with contextlib.ExitStack() as stack:
        for places, to in ((PRODUCTS, half), (WIDE, torch.float32)):
            for owner, name in places:
                patch = mock.patch.object(owner, name, casting(getattr(owner, name), to))
                stack.enter_context(patch)
        yield cached
