"""What a step costs, as one typed record: what is written, read again and shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from costbp.config.cards import card
from costbp.config.entries import Strict
from costbp.errors import UserError
from costbp.files import write_json

R = TypeVar("R", bound=Strict)


class CostRecord(Strict):
    """Cost of an optimiser step of one method: FLOPs, units and seconds are means over the estimator's
    cycle (SVRG's snapshots, calibrations), bytes those of its largest step."""

    model: str
    task: str | None = Field(None, description="None where only the shape of batches is given.")
    method: str
    device: str = Field(description="`meta` where traced without weights.")
    batch: int
    seq: int = Field(description="Tokens an example; 0 where the model reads features.")
    forward_units: float
    closed_form: float | None = Field(description="Forward units in closed form, where known.")
    flops: float
    forward_flops: float
    peak_bytes: int = Field(description="Beyond weights, theta, gradient and state.")
    peak_by_category: dict[str, int] = Field(description="All bytes at the peak.")
    weights_bytes: int
    state_bytes: int = Field(description="Theta, gradient, the optimiser's and estimator's state.")
    d: int
    seconds: float | None = Field(None, description="None where traced, or not timed.")
    forward_seconds: float | None = None
    seconds_by_card: dict[str, float] = Field({}, description="By published peaks of cards.")
    card: str | None = Field(None, description="That was asked for.")
    card_seconds: float | None = Field(None, description="A step on it by its published peaks.")
    joules: float | None = Field(None, description="The same at the card's largest power.")
    allocated_bytes: int | None = Field(None, description="By the allocator of a GPU, if asked.")
    reserved_bytes: int | None = None
    allocated: int | None = Field(
        None, description="Bytes that a GPU's allocator would hand out at the peak, as replayed."
    )
    reserved: int | None = Field(None, description="Those that it would take from the driver.")
    profile: str | None = Field(None, description="Whose training loop; none: this package's.")
    value: int | None = Field(None, description="Of the key that a sweep varies.")

    def on(self, name: str) -> CostRecord:
        """The same with the step's seconds and energy on a card."""
        spent = self.seconds_by_card[name]
        found = {"card": name, "card_seconds": spent, "joules": spent * card(name).watts}
        return self.model_copy(update=found)

    @property
    def bytes(self) -> int:
        """All bytes at the peak, weights included."""
        return sum(self.peak_by_category.values())

    @property
    def time(self) -> float | None:
        """Time of a step in no-grad forwards of one batch."""
        if self.seconds is None or self.forward_seconds is None:
            return None
        return self.seconds / self.forward_seconds

    @property
    def beyond(self) -> int:
        """Bytes at the peak beyond the frozen weights."""
        return self.bytes - self.weights_bytes


class Fit(Strict):
    """What a method can do within a memory."""

    model: str
    memory: str = Field(description="As given: 24GB.")
    method: str
    seq: int
    wanted_batch: int
    units: float = Field(description="Forward units of a step at that batch and length.")
    bytes: int = Field(description="At its peak, weights included.")
    allocated: int = Field(description="What a GPU's allocator hands out for it.")
    reserved: int = Field(description="What that takes from the driver.")
    batch: int = Field(description="The largest at that length; 0 where none fits.")
    length: int | None = Field(description="The largest at that batch; None if not searched.")


class Needs(Strict):
    """What each method's step needs on one model."""

    model: str
    parameters: int
    bytes: dict[str, int] = Field(description="At a step's peak, weights included, by method.")
    units: dict[str, float]


def write_costs(path: Path, records: Iterable[Strict]) -> None:
    """Store records as a rule's output."""
    write_json(path, [record.model_dump(mode="json") for record in records])


def read_costs(path: Path) -> list[CostRecord]:
    """Cost records stored by ``write_costs``.

    Raises:
        UserError: the file is missing, or damaged.
    """
    return read_records(path, CostRecord)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Records of a kind, stored by ``write_costs``.

    Raises:
        UserError: the file is missing, or damaged.
    """
    try:
        return [kind.model_validate(entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run `snakemake` to compute it", 1) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete it and run `snakemake` again", 1) from error
