"""What a task's rows mean: the `loader` of a task's entry."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from costbp.config.entries import PythonFile, Strict


class TaskFile(PythonFile):
    """A Python file that defines a task."""

    function: str = Field("TASK", description="Name of a `Task`, or of a function returning one.")


def _text(label: Any) -> str:
    """A label as a file of text spells it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


class Classification(Strict):
    """Texts of classes, without any code: rows with a `text` and a `label` (`data.columns`)."""

    kind: Literal["classification"] = "classification"
    names: tuple[str, ...] = Field(min_length=2, description="The classes, in order.")
    labels: dict[Annotated[str, BeforeValidator(_text)], str] = Field(
        {},
        description="The source's label -> the class it means; default: the names themselves. A number "
        "is never taken for a place among the names.",
    )
    instruction: str = Field(
        "", description="What a language model is told after the text; default: the names."
    )

    @model_validator(mode="after")
    def _every_name_once(self) -> Self:
        names = ", ".join(self.names)
        if len(set(self.names)) < len(self.names) or not all(self.names):
            raise ValueError(f"loader.names has one twice, or an empty one: {names}")
        for label, name in self.labels.items():
            if name not in self.names:
                raise ValueError(f"loader.labels: {label} means '{name}'; allowed: {names}")
        if self.labels and (without := set(self.names) - set(self.labels.values())):
            raise ValueError(f"loader.labels: no label means '{min(without)}'")
        return self


def _spelt_out(value: Any) -> Any:
    """A file's path alone stands for the file, and a kind alone for an entry of that kind."""
    if isinstance(value, str):
        return {"kind": "python", "file": value} if value.endswith(".py") else {"kind": value}
    return value


def _tag(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", value)
    if kind == "classification":
        return kind
    return "name" if isinstance(value, str) and not value.endswith(".py") else "python"


Loader = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[TaskFile, BeforeValidator(_spelt_out), Tag("python")]
    | Annotated[Classification, BeforeValidator(_spelt_out), Tag("classification")],
    Discriminator(_tag),
]
