"""The vocabulary of what estimators are made of: oracles, which measure derivatives, and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from costbp.config.entries import Strict
from costbp.config.shares import Shares

if TYPE_CHECKING:
    from costbp.estimators.directions import Source
    from costbp.estimators.oracles import Central, Exact, OneSided

# --- oracles ---------------------------------------------------------------------------------


class ExactOracle(Strict):
    """Exact directional derivative by forward-mode AD."""

    kind: Literal["exact"]
    chunk: int | None = Field(
        None, ge=1, description="Directions carried at a time; default: all at once."
    )

    def closed_form(self, count: int, shares: Shares) -> float:
        """K tangents, and one primal for each chunk of them."""
        return count * shares.live + -(-count // (self.chunk or count))

    def build(self) -> Exact:
        from costbp.estimators.oracles import Exact

        return Exact(self.chunk)


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
    description="Run the K perturbed parameter sets as one forward. `auto`: where K > 1 and the "
    "batch has at most 64 tokens (examples, where the input is features).",
)


class CentralOracle(Strict):
    """Central difference of two losses, `(f(theta + eps z) - f(theta - eps z)) / (2 eps)`."""

    kind: Literal["central"]
    eps: float | None = EPS
    batched: Batched = BATCHED

    def closed_form(self, count: int, shares: Shares) -> float:
        """Two forwards for each direction."""
        return 2.0 * count

    def build(self) -> Central:
        from costbp.estimators.oracles import Central

        return Central(self.eps, self.batched)


class OneSidedOracle(Strict):
    """Forward difference, `(f(theta + eps z) - f(theta)) / eps`, one base loss for all K."""

    kind: Literal["one_sided"]
    eps: float | None = EPS
    batched: Batched = BATCHED

    def closed_form(self, count: int, shares: Shares) -> float:
        """One forward for each direction, and one at theta."""
        return 1.0 + count

    def build(self) -> OneSided:
        from costbp.estimators.oracles import OneSided

        return OneSided(self.eps, self.batched)


AnyOracle = Annotated[ExactOracle | CentralOracle | OneSidedOracle, Field(discriminator="kind")]


# --- directions --------------------------------------------------------------------------------


class Drawn(Strict):
    """What all kinds of directions have."""

    count: int = Field(1, ge=1, description="Directions K per estimate.")

    def probing(self, oracle: AnyOracle, shares: Shares) -> float:
        """Units a step, on average, of derivatives measured beside those of the estimate."""
        return 0.0


class PlainDirections(Drawn):
    """Directions that need no setting of their own."""

    kind: Literal["gaussian", "rademacher", "sphere", "orthogonal", "coordinate"] = "gaussian"

    def build(self) -> Source:
        from costbp.estimators.directions import PLAIN

        return PLAIN[self.kind]()


class SparseDirections(Drawn):
    """Gaussian on the largest entries of each trainable tensor, zero elsewhere."""

    kind: Literal["sparse"]
    fraction: float = Field(gt=0, le=1, description="Share of entries kept in each tensor.")
    refresh: int = Field(ge=1, description="Steps after which the entries are chosen anew.")

    def build(self) -> Source:
        from costbp.estimators.directions import Sparse

        return Sparse(self.fraction, self.refresh)


class LowRankDirections(Drawn):
    """Low-rank on every matrix."""

    kind: Literal["low_rank"]
    rank: int = Field(ge=1, description="Rank of a matrix's direction.")
    refresh: int = Field(1, ge=1, description="Steps for which one factor is kept.")

    def build(self) -> Source:
        from costbp.estimators.directions import LowRank

        return LowRank(self.rank, self.refresh)


class CalibratedDirections(Drawn):
    """Gaussian, scaled or chosen by probing groups of tensors."""

    kind: Literal["calibrated"]
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

    def probing(self, oracle: AnyOracle, shares: Shares) -> float:
        if self.every is None:
            return 0.0
        groups = -(-shares.tensors // self.group)
        return groups * oracle.closed_form(self.candidates, shares) / self.every

    def build(self) -> Source:
        from costbp.estimators.calibrated import Calibrated

        return Calibrated(self.candidates, self.group, self.every, self.use)


AnyDirections = Annotated[
    PlainDirections | SparseDirections | LowRankDirections | CalibratedDirections,
    Field(discriminator="kind"),
]
