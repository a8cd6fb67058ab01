"""What every catalog entry has in common.

An entry's identity is everything that can change a result. Text for readers (label, citation,
notes) is marked cosmetic and stays out of the hash of a run, so that mending a label recomputes
nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Strict):
    """A catalog entry; ``label``, ``citation`` and ``notes`` are for readers only."""

    cosmetic: ClassVar[set[str]] = {"label", "citation", "notes"}

    label: str = Field(description="Name used in tables and figures.")
    citation: str | None = Field(None, description="Where the entry comes from.")
    notes: str | None = Field(None, description="What a reader should know about it.")

    def identity(self) -> dict[str, Any]:
        """What a run's hash is made of: the entry without its cosmetic fields."""
        return self.model_dump(mode="json", exclude=self.cosmetic)


def short_hash(value: Any) -> str:
    """First eight hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
