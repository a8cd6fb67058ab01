"""The vocabulary of methods: how a step's gradient is obtained. Docstrings of the parts
(`costbp/estimators`) give formulas and sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from costbp.config.entries import Entry, PythonFile, Strict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Family = Literal["bp", "fmad", "zo"]


class BackpropSpec(Strict):
    """Reverse mode under a memory plan."""

    kind: Literal["backprop"]
    plan: Literal["none", "per_block", "sqrt", "selective", "byte_budget", "offload"] = Field(
        "none",
        description="`none` stores every activation; `per_block` recomputes each block but the "
        "last in backward, `sqrt` segments of about sqrt(L) blocks, `selective` all but matrix "
        "products; `byte_budget` keeps as many blocks as fit; `offload` moves activations to the "
        "host.",
    )
    mebibytes: float | None = Field(
        None, gt=0, description="`byte_budget` only: peak beyond weights, in MiB."
    )

    @model_validator(mode="after")
    def _budget(self) -> BackpropSpec:
        if (self.plan == "byte_budget") != (self.mebibytes is not None):
            raise ValueError("'mebibytes' goes with plan 'byte_budget', and only with it")
        return self


# --- oracles ---------------------------------------------------------------------------------


class ExactOracle(Strict):
    """Exact directional derivative by forward-mode AD."""

    kind: Literal["exact"]
    chunk: int | None = Field(
        None, ge=1, description="Directions carried at a time; default: all at once."
    )


Batched = Literal["auto", "always", "never"]
EPS: Any = Field(
    None,
    gt=0,
    description="Step of the difference. Default: 0.001 where a probe before the first step finds it "
    "right, else what the probe finds best; where rounding of a base in half precision drowns every "
    "step, losses are computed in float32. The probe's forwards are recorded, not charged.",
)
BATCHED: Any = Field(
    "auto",
    description="Evaluate the K perturbed parameter sets as one batched forward: `auto` does so "
    "for small inputs.",
)


class CentralOracle(Strict):
    """Central difference of two losses, `(f(theta + eps z) - f(theta - eps z)) / (2 eps)`."""

    kind: Literal["central"]
    eps: float | None = EPS
    batched: Batched = BATCHED


class OneSidedOracle(Strict):
    """Forward difference, `(f(theta + eps z) - f(theta)) / eps`, one base loss for all K."""

    kind: Literal["one_sided"]
    eps: float | None = EPS
    batched: Batched = BATCHED


AnyOracle = Annotated[ExactOracle | CentralOracle | OneSidedOracle, Field(discriminator="kind")]


# --- directions --------------------------------------------------------------------------------

COUNT: Any = Field(1, ge=1, description="Directions K per estimate.")


class PlainDirections(Strict):
    """Directions that need no setting of their own."""

    kind: Literal["gaussian", "rademacher", "sphere", "orthogonal", "coordinate"] = "gaussian"
    count: int = COUNT


class SparseDirections(Strict):
    """Gaussian on the largest entries of each trainable tensor, zero elsewhere."""

    kind: Literal["sparse"]
    count: int = COUNT
    fraction: float = Field(gt=0, le=1, description="Share of entries kept in each tensor.")
    refresh: int = Field(ge=1, description="Steps after which the entries are chosen anew.")


class LowRankDirections(Strict):
    """Low-rank on every matrix."""

    kind: Literal["low_rank"]
    count: int = COUNT
    rank: int = Field(ge=1, description="Rank of a matrix's direction.")
    refresh: int = Field(1, ge=1, description="Steps for which one factor is kept.")


class CalibratedDirections(Strict):
    """Gaussian, scaled or chosen by probing groups of tensors."""

    kind: Literal["calibrated"]
    count: int = COUNT
    candidates: int = Field(4, ge=1, description="Directions probed for each group.")
    group: int = Field(2, ge=1, description="Consecutive trainable tensors in a group.")
    every: int | None = Field(
        ge=1, description="Steps between calibrations; null: at the first step only."
    )
    use: Literal["scale", "largest", "smallest"] = Field(
        "scale",
        description="`scale` sets each group's scale until the next calibration; `largest` and "
        "`smallest` take the candidate of that derivative in the calibrating step.",
    )


AnyDirections = Annotated[
    PlainDirections | SparseDirections | LowRankDirections | CalibratedDirections,
    Field(discriminator="kind"),
]


# --- estimators --------------------------------------------------------------------------------


class ProjectedSpec(Strict):
    """Gradient from directional derivatives: mean over K of (derivative along z) z."""

    kind: Literal["projected"]
    oracle: AnyOracle
    directions: AnyDirections = PlainDirections()
    scale: Literal["unbiased", "spread", "legacy"] = Field(
        "unbiased",
        description="`spread` divides by the standard deviation of the K derivatives; `legacy` "
        "multiplies by eps, as the study's ZO code does.",
    )
    clip: float | None = Field(None, gt=0, description="Largest absolute derivative used.")

    @model_validator(mode="after")
    def _consistent(self) -> ProjectedSpec:
        if self.scale == "legacy" and isinstance(self.oracle, ExactOracle):
            raise ValueError("scale 'legacy' multiplies by eps, which oracle 'exact' has not")
        if self.scale == "spread" and self.directions.count < 2:
            raise ValueError("scale 'spread' needs directions.count >= 2")
        return self


class HessianInformedSpec(Strict):
    """Zeroth order scaled by an estimate of the Hessian's diagonal (HiZOO)."""

    kind: Literal["hessian_informed"]
    eps: float | None = EPS
    smoothing: float = Field(1e-3, gt=0, le=1, description="Share of the newest curvature.")


class LocalGuessSpec(Strict):
    """Exact derivatives along directions that each block's local loss proposes."""

    kind: Literal["local_guess"]
    oracle: ExactOracle = ExactOracle(kind="exact")


class PythonSpec(PythonFile):
    """An estimator of your own: a function in a file, called with `options` as keywords."""

    units: float | None = Field(None, gt=0, description="Forward units expected of a step.")


AnyEstimator = Annotated[
    BackpropSpec | ProjectedSpec | HessianInformedSpec | LocalGuessSpec | PythonSpec,
    Field(discriminator="kind"),
]


class SvrgSpec(Strict):
    """Variance reduction by a snapshot of the parameters."""

    period: int = Field(ge=1, description="Steps between snapshots.")
    snapshot_batches: int = Field(ge=1, description="Batches behind a snapshot's gradient.")


class ClipSpec(Strict):
    """Clipping of the finished estimate; by norm first."""

    norm: float | None = Field(None, gt=0, description="Largest Euclidean norm.")
    value: float | None = Field(None, gt=0, description="Largest absolute entry.")


LEAST_RATE = 1e-5  # the least that is published for zeroth order with adapters


class OptimizerSpec(Strict):
    """A torch optimiser on the flat parameter vector."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0, description="Learning rate.")
    falls_from: int | None = Field(
        None,
        ge=1,
        description="d up to which `lr` holds; for a longer trainable vector it falls as 1/d, as "
        "the largest stable step of a projected estimate does, to 1e-5 at the least.",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only.")
    weight_decay: float = Field(0.0, ge=0)

    def rate(self, d: int) -> float:
        """The learning rate for d trainable parameters."""
        if self.falls_from is None or d <= self.falls_from:
            return self.lr
        return min(self.lr, max(self.lr * self.falls_from / d, LEAST_RATE))

    def build(self, theta: Tensor) -> Optimizer:
        """The optimiser, for the flat vector [d]."""
        import torch

        lr, decay = self.rate(theta.numel()), self.weight_decay
        if self.name == "adamw":
            return torch.optim.AdamW([theta], lr=lr, weight_decay=decay)
        return torch.optim.SGD([theta], lr=lr, momentum=self.momentum, weight_decay=decay)


class MethodEntry(Entry):
    """How a step's gradient is obtained, and the optimiser it is given to."""

    family: Family = Field(description="Groups methods in figures and claims.")
    estimator: AnyEstimator
    accumulate: int = Field(1, ge=1, description="Micro-batches averaged before a step.")
    svrg: SvrgSpec | None = Field(None, description="Variance reduction by snapshots.")
    clip: ClipSpec = ClipSpec()
    sign: bool = Field(False, description="Replace the estimate by its signs.")
    optimizer: OptimizerSpec = Field(description="Default where no tuned choice exists.")
    trials: tuple[OptimizerSpec, ...] = Field(
        min_length=1, description="What `tune` tries: the same number for every method of a study."
    )
    reference: bool = Field(
        False, description="True for the BP variant that claims compare the others with."
    )

    cosmetic: ClassVar[set[str]] = Entry.cosmetic | {"optimizer", "trials", "reference", "family"}

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
