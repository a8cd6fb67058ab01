"""The vocabulary of methods: how a step's gradient is obtained.

A part's spec carries all that belongs to the part: its fields, what it costs in closed form
(``closed_form``), and what it is when it runs (``build``, which imports torch only then). Docstrings of the
parts themselves (`costbp/estimators`) give formulas and sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from costbp.config.entries import Entry, PythonFile, Strict
from costbp.config.optimizer import Name, OptimizerSpec
from costbp.config.parts import (
    EPS,
    AnyDirections,
    AnyOracle,
    CalibratedDirections,
    ExactOracle,
    PlainDirections,
)
from costbp.config.shares import RULE_OF_THUMB, Shares

if TYPE_CHECKING:
    from costbp.estimators.base import Estimator
    from costbp.estimators.memory_plans import MemoryPlan

Family = Literal["bp", "fmad", "zo"]


class BackpropSpec(Strict):
    """Reverse mode under a memory plan."""

    kind: Literal["backprop"]
    plan: Literal["none", "per_block", "selective", "byte_budget", "sub_layer", "offload"] = Field(
        "none",
        description="`none` stores every activation; `per_block` recomputes each block but the "
        "last in backward, `selective` all but matrix products; `byte_budget` keeps as many blocks "
        "as fit; `sub_layer` recomputes half a block at a time; `offload` moves activations from a "
        "GPU to the host.",
    )
    mebibytes: float | None = Field(
        None,
        gt=0,
        description="Required by `byte_budget`, not allowed with others: largest peak of a step "
        "beyond weights, gradient, optimiser state and batch, in MiB. Where a step needs more even "
        "with every block recomputed, the run fails and says how much.",
    )
    inputs: int | None = Field(
        None,
        ge=1,
        description="Of `sub_layer` only: inputs of blocks that exist at a time; default: as few as "
        "one more forward pass allows, n for n (n + 1) / 2 blocks.",
    )

    @model_validator(mode="after")
    def _budget(self) -> BackpropSpec:
        if (self.plan == "byte_budget") != (self.mebibytes is not None):
            raise ValueError("'mebibytes' goes with plan 'byte_budget', and only with it")
        if self.plan != "sub_layer" and self.inputs is not None:
            raise ValueError("'inputs' goes with plan 'sub_layer' only")
        return self

    def closed_form(self, shares: Shares) -> float:
        """Forward, backward, and what the plan computes again."""
        again = dict.fromkeys(("per_block", "byte_budget"), shares.recomputed)
        again["sub_layer"] = shares.halves + shares.dropped(self.inputs)
        return 1 + shares.backward + again.get(self.plan, 0.0)

    def build(self) -> Estimator:
        from costbp.estimators.backprop import Backprop
        from costbp.estimators.memory_plans import PLANS, ByteBudget, SubLayers

        plan: MemoryPlan = PLANS.get(self.plan) or ByteBudget(self.mebibytes or 0.0)
        return Backprop(SubLayers(self.inputs) if self.inputs else plan)


# --- estimators --------------------------------------------------------------------------------


class ProjectedSpec(Strict):
    """Gradient from directional derivatives: mean over K of (derivative along z) z."""

    kind: Literal["projected"]
    oracle: AnyOracle = Field(description="How derivatives are measured.")
    directions: AnyDirections = Field(PlainDirections(), description="Along what.")
    scale: Literal["unbiased", "spread", "legacy"] = Field(
        "unbiased",
        description="`spread` divides by the standard deviation of the K derivatives; `legacy` "
        "multiplies by eps, as the study's ZO code does.",
    )
    clip: float | None = Field(None, gt=0, description="Largest absolute derivative used.")
    groups: Annotated[int, Field(ge=1)] | Literal["examples"] = Field(
        1,
        description="Parts of a batch, each with `count` directions of its own at the forwards of one; "
        "`examples`: as many as there are examples.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ProjectedSpec:
        if self.scale == "legacy" and isinstance(self.oracle, ExactOracle):
            raise ValueError("scale 'legacy' multiplies by eps, which oracle 'exact' has not")
        if self.scale == "spread" and self.directions.count < 2 and self.groups == 1:
            raise ValueError("scale 'spread' needs directions.count >= 2, or groups")
        return self

    def closed_form(self, shares: Shares) -> float:
        """Its oracle's, for K directions and for what their source measures beside them."""
        own = self.oracle.closed_form(self.directions.count, shares)
        return own + self.directions.probing(self.oracle, shares)

    def build(self) -> Estimator:
        from costbp.estimators.projected import Projected

        source, count = self.directions.build(), self.directions.count
        oracle = self.oracle.build()
        return Projected(oracle, source, count, self.scale, self.clip, self.groups)


class HessianInformedSpec(Strict):
    """Zeroth order scaled by an estimate of the Hessian's diagonal (HiZOO)."""

    kind: Literal["hessian_informed"]
    eps: float | None = EPS
    smoothing: float = Field(1e-8, gt=0, le=1, description="Share of the newest curvature.")

    def closed_form(self, shares: Shares) -> float:
        """A central difference, and the loss between its sides."""
        return 3.0

    def build(self) -> Estimator:
        from costbp.estimators.hessian_informed import HessianInformed
        from costbp.estimators.oracles import Central

        return HessianInformed(Central(self.eps), self.smoothing)


class NodePerturbationSpec(Strict):
    """Differences along moved outputs of the trained linear layers, example by example."""

    kind: Literal["node_perturbation"]
    eps: float | None = EPS

    def closed_form(self, shares: Shares) -> float:
        """Two forwards; the products of adapters' gradients are small."""
        return 2.0

    def build(self) -> Estimator:
        from costbp.estimators.nodes import NodePerturbation
        from costbp.estimators.oracles import Central

        return NodePerturbation(Central(self.eps))


class LocalGuessSpec(Strict):
    """Exact derivatives along directions that each block's local loss proposes."""

    kind: Literal["local_guess"]
    oracle: ExactOracle = Field(
        ExactOracle(kind="exact"), description="How derivatives along the guesses are measured."
    )

    def closed_form(self, shares: Shares) -> float:
        """The guesses by backpropagation, and a derivative along each block's."""
        return 1.0 + shares.backward + self.oracle.closed_form(shares.blocks + 1, shares)

    def build(self) -> Estimator:
        from costbp.estimators.guess import LocalGuess

        return LocalGuess(self.oracle.build())


class PythonSpec(PythonFile):
    """An estimator of your own: a function in a file, called with `options` as keywords."""

    units: float | None = Field(None, gt=0, description="Forward units expected of a step.")

    def closed_form(self, shares: Shares) -> float | None:
        """What its author expects."""
        return self.units

    def build(self) -> Estimator:
        from costbp.estimators.base import Estimator

        return self.call(Estimator)  # type: ignore[type-abstract]


AnyEstimator = Annotated[
    BackpropSpec
    | ProjectedSpec
    | HessianInformedSpec
    | NodePerturbationSpec
    | LocalGuessSpec
    | PythonSpec,
    Field(discriminator="kind"),
]


class SvrgSpec(Strict):
    """Variance reduction by a snapshot of the parameters."""

    period: int = Field(ge=1, description="Steps between snapshots.")
    snapshot_batches: int = Field(ge=1, description="Batches behind a snapshot's gradient.")

    @property
    def factor(self) -> float:
        """Inner estimates a step, on average over a period: the snapshot's, and two in others."""
        return (2 * (self.period - 1) + self.snapshot_batches) / self.period


class MethodEntry(Entry):
    """How a step's gradient is obtained, and the optimiser it is given to."""

    family: Family = Field(description="Groups methods in figures and claims.")
    estimator: AnyEstimator = Field(description="How a gradient is estimated.")
    accumulate: int = Field(1, ge=1, description="Micro-batches averaged before a step.")
    svrg: SvrgSpec | None = Field(None, description="Variance reduction by snapshots.")
    clip_norm: float | None = Field(
        None, gt=0, description="Largest Euclidean norm of an estimate; a longer one is scaled."
    )
    sign: bool = Field(False, description="Replace the estimate by its signs.")
    optimizer: OptimizerSpec = Field(description="Default where no tuned choice exists.")
    optimizers: tuple[Name, ...] = Field(
        ("sgd", "adamw"),
        min_length=1,
        description="What `tune` may try: one where the optimiser is part of the method.",
    )
    reference: bool = Field(
        False, description="True for the BP variant that claims compare the others with."
    )

    cosmetic: ClassVar[set[str]] = Entry.cosmetic | {
        "optimizer",
        "optimizers",
        "reference",
        "family",
    }

    @model_validator(mode="after")
    def _default_is_allowed(self) -> MethodEntry:
        if self.optimizer.name not in self.optimizers:
            raise ValueError(f"optimizer.name = '{self.optimizer.name}' is not among 'optimizers'")
        return self

    @model_validator(mode="after")
    def _svrg_shares_directions(self) -> MethodEntry:
        directions = getattr(self.estimator, "directions", None)
        learns = isinstance(self.estimator, HessianInformedSpec | LocalGuessSpec)
        if self.svrg and (learns or isinstance(directions, CalibratedDirections)):
            raise ValueError(
                "'svrg' subtracts two estimates along the same directions, and this estimator's "
                "directions follow what it measures"
            )
        return self

    @property
    def differentiates(self) -> bool:
        """Whether it needs a loss with derivatives, as far as its entry tells."""
        exact = isinstance(getattr(self.estimator, "oracle", None), ExactOracle)
        return exact or isinstance(self.estimator, BackpropSpec)

    def closed_form(self, shares: Shares = RULE_OF_THUMB) -> float | None:
        """Mean forward units of an optimiser step in closed form: the floor that counted FLOPs are
        held against; None where an estimator of the user's own states nothing.

        Backpropagation 2 (forward, activation gradient), 3 with every block recomputed; forward mode
        1 + K; central differences 2K; one-sided 1 + K; accumulation multiplies; SVRG doubles, and
        adds its snapshots' share. Exact with the shares of the model's products
        (``cost/products.py``).
        """
        own = self.estimator.closed_form(shares)
        if own is None:
            return None
        return own * self.accumulate * (self.svrg.factor if self.svrg is not None else 1)

    def build(self) -> Estimator:
        """The estimator with its wrappers: accumulation innermost, then SVRG, then clipping and
        signs."""
        from costbp.estimators.clipping import Clipped
        from costbp.estimators.variance import SVRG, Accumulate

        estimator = self.estimator.build()
        if self.accumulate > 1:
            estimator = Accumulate(estimator, self.accumulate)
        if self.svrg is not None:
            estimator = SVRG(estimator, self.svrg.period, self.svrg.snapshot_batches)
        if self.clip_norm is not None or self.sign:
            estimator = Clipped(estimator, self.clip_norm, self.sign)
        return estimator
