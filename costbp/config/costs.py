"""What `snakemake costs` traces: a part of the study, of which no run depends."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from costbp.config.cards import CARDS
from costbp.config.entries import EntryName, Strict
from costbp.errors import suggest


def card_bytes(text: str) -> int:
    """``24GB`` in bytes. A card sold as 24 GB has 24 GiB, so GB is read as GiB.

    Raises:
        ValueError: no positive number, or no unit.
    """
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]+)?)\s*([KMGT])i?B?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError("wants a number with a unit, as 24GB or 512MB, above 0 and below 10^9")
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2].upper())))


class Sweep(Strict):
    """Cost against one key, everything else held."""

    label: str = Field(description="Name of the axis.")
    model: str = Field(description="Name in models.yaml.")
    key: str = Field(
        description="`batch`, `seq`, a key of the model's entry (`train.rank`), or, after "
        "`method.`, of the methods' (`method.estimator.directions.count`)."
    )
    values: tuple[int, ...] = Field(min_length=2, description="That the key takes.")
    methods: tuple[str, ...] | None = Field(None, description="Default: those of `costs`.")


class Fits(Strict):
    """The largest batch of each method on cards of several sizes."""

    models: tuple[str, ...] = Field(min_length=1, description="Names in models.yaml.")
    methods: tuple[str, ...] = Field(min_length=1, description="Names in methods.yaml.")
    cards: tuple[str, ...] = Field(min_length=1, description="Memories, as 24GB.")

    @field_validator("cards")
    @classmethod
    def _sizes(cls, cards: tuple[str, ...]) -> tuple[str, ...]:
        for card in cards:
            card_bytes(card)
        return cards


class Costs(Strict):
    """Steps traced at full size, without weights."""

    models: tuple[str, ...] = Field(
        min_length=1, description="Names in models.yaml, of source `kind: config`."
    )
    methods: tuple[str, ...] = Field(min_length=1, description="Names in methods.yaml.")
    batch: int = Field(8, ge=1, description="Examples a batch.")
    seq: int = Field(64, ge=2, description="Tokens an example.")
    sweeps: dict[EntryName, Sweep] = Field({}, description="Cost against one key, by name.")
    card: str | None = Field(None, description=f"Seconds and energy on it: {', '.join(CARDS)}.")
    fits: Fits | None = Field(None, description="The largest batch on each card.")

    @field_validator("card")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in CARDS:
            raise ValueError(suggest(name, CARDS))
        return name
