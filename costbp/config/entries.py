"""What every catalog entry has in common.

An entry's identity is everything that can change a result. Text for readers (label, citation,
notes) is marked cosmetic and stays out of the hash of a run, so that mending a label recomputes
nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from costbp.errors import UserError, first_line

T = TypeVar("T")

# names become folders, wildcards and words of commands: at most 64 characters
NAME = "^([A-Za-z0-9_]|[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-])$"
EntryName = Annotated[str, Field(pattern=NAME)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """Immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Entry(Strict):
    """A catalog entry; ``label``, ``citation`` and ``notes`` are for readers only."""

    cosmetic: ClassVar[set[str]] = {"label", "citation", "notes"}

    label: str = Field(description="Name used in tables and figures.")
    citation: str | None = Field(None, description="Where the entry comes from.")
    notes: str | None = Field(None, description="What a reader should know about it.")

    def identity(self, *, exclude_defaults: bool = False) -> dict[str, Any]:
        """What a run's hash is made of: the entry without its cosmetic fields, and checksums of the
        Python files that it names."""
        files = {name: part.checksum for name, part in self if isinstance(part, PythonFile)}
        found = self.model_dump(
            mode="json", exclude=self.cosmetic, exclude_defaults=exclude_defaults
        )
        return found | {"files": files} if files else found


class PythonFile(Strict):
    """A part of your own: a function in a file, called with ``options`` as keywords."""

    kind: Literal["python"]
    file: Path = Field(description="Python file, relative to the working directory.")
    function: str = Field("build", description="Name of the function that returns the part.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its keyword arguments.")

    @field_validator("file")
    @classmethod
    def _is_a_file(cls, file: Path) -> Path:
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        return file

    @property
    def checksum(self) -> str:
        """SHA-256 of the file: a part whose code has changed is another one."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def call(self, wanted: type[T], **context: Any) -> T:
        """What the function returns for its options, and for ``context`` that the caller adds; or
        what has the function's name, where that is a ``wanted`` already.

        Raises:
            UserError: the file can't be run, has no such function, it takes other keywords, or it
                returns something else than ``wanted``.
        """
        found = importlib.util.spec_from_file_location(f"costbp_file_{self.file.stem}", self.file)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses look their module up
        try:
            found.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"{self.file}: can't be run ({type(error).__name__}: {first_line(error)})"
            ) from error
        function = getattr(module, self.function, None)
        if isinstance(function, wanted):
            return function
        if not callable(function):
            raise UserError(f"{self.file}: has no function '{self.function}'")
        try:
            part = function(**context, **self.options)
        except TypeError as error:
            raise UserError(f"{self.file}: {error}") from error
        if not isinstance(part, wanted):
            package = wanted.__module__.rpartition(".")[0]
            raise UserError(
                f"{self.file}: {self.function}() must return a {package}.{wanted.__name__}, "
                f"not {type(part).__name__}"
            )
        return part


def short_hash(value: Any) -> str:
    """First eight hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
