"""Reading YAML into models: overlays, and errors that name file, key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from costbp.config.entries import NAME
from costbp.errors import UserError, suggest

T = TypeVar("T")
Loc = tuple[int | str, ...]
Sources = Sequence[tuple[Path, Any]]  # file, content; the last has the last word
TAGS = ("kind", "reading")  # keys whose value says which model of a union is meant


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``top`` laid over it: mappings of one ``kind`` merge, anything else (lists too)
    is replaced."""
    merged = dict(deepcopy(base))
    for key, value in top.items():
        below = merged.get(key)
        both = (
            isinstance(value, Mapping)
            and isinstance(below, Mapping)
            and value.get("kind", below.get("kind")) == below.get("kind")
        )
        merged[key] = overlay(merged[key], value) if both else deepcopy(value)
    return merged


def laid_over(sources: Sources) -> dict[str, Any]:
    """The files' content, each laid over those before it.

    Raises:
        UserError: a file holds something else than keys and values.
    """
    data: dict[str, Any] = {}
    for path, content in sources:
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: must hold keys and values, not a {type(content).__name__}")
        data = overlay(data, content)
    return data


def dotted(loc: Loc) -> str:
    """``experiments[0].methods[2]`` from pydantic's location tuple."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def value_at(data: Any, loc: Loc) -> Any:
    """What stands at ``loc``; None where nothing does."""
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _plain(data: Any, loc: Loc) -> Loc:
    """``loc`` as a user wrote it: without the tags of unions, which are no keys of the file."""
    plain: Loc = ()
    for index, part in enumerate(loc):
        if value_at(data, (*plain, part)) is not None or index == len(loc) - 1:
            plain = (*plain, part)
    return plain


def _fields_at(model: type, loc: Loc) -> list[str]:
    """The keys allowed at ``loc``, found by walking the models' annotations."""
    models = _models_in(model)
    for part in loc:
        tagged = [m for m in models if _is_tagged(m, part)]
        if tagged:  # a union's tag, which is no key of the file
            models = tagged
            continue
        reached: list[type[BaseModel]] = []
        for candidate in models:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                reached += _models_in(field.annotation)
            else:  # a dictionary's key or a list's place: stay
                reached.append(candidate)
        models = reached
    return sorted({name for candidate in models for name in candidate.model_fields})


def _is_tagged(model: type[BaseModel], tag: int | str) -> bool:
    fields = [model.model_fields[key] for key in TAGS if key in model.model_fields]
    return any(tag in get_args(field.annotation) for field in fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def blame(sources: Sources, loc: Loc) -> Path:
    """The last file that sets the key (or the nearest parent of it)."""
    for depth in range(len(loc), 0, -1):
        for path, data in reversed(sources):
            if value_at(data, loc[:depth]) is not None:
                return path
    return sources[-1][0]


def validate(model: type[T], data: Any, sources: Sources) -> T:
    """Validate ``data``, whose parts come from ``sources`` (file, content), into ``model``.

    Raises:
        UserError: one line naming file, key, value and what is allowed.
    """
    try:
        return TypeAdapter(model).validate_python(data)
    except ValidationError as error:
        # a misspelt key also makes the right one missing: name the misspelling
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise UserError(_explain(model, data, sources, first, error.error_count())) from None


def _explain(
    model: type,
    data: Any,
    sources: Sources,
    problem: Any,
    count: int,
) -> str:
    loc: Loc = tuple(problem["loc"])
    plain = _plain(data, loc)
    file, kind, context = blame(sources, plain), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(model, loc[:-1])
        text = f"unknown key '{dotted(plain)}'; {suggest(loc[-1], allowed)}"
    elif kind == "missing":
        text = f"key '{dotted(plain)}' is missing"
    elif kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        text = f"key '{dotted((*plain, key))}' is missing"
    elif kind in ("literal_error", "union_tag_invalid"):
        if kind == "union_tag_invalid":
            plain = (*plain, context["discriminator"].strip("'"))
        expected = str(context.get("expected") or context.get("expected_tags"))
        allowed = [part.strip(" '\"") for part in expected.replace(" or ", ",").split(",")]
        value = context.get("tag", problem["input"])
        text = f"unknown key '{value}'; {suggest(value, allowed)}"
        if plain[-1] != "[key]":  # pydantic's name for a key of a mapping
            text = f"{dotted(plain)} = '{value}' is not known; {suggest(value, allowed)}"
    elif context.get("pattern") == NAME:
        place = dotted(tuple(part for part in plain if part != "[key]")[:-1] or plain)
        text = (
            f"{place}: {str(problem['input'])[:80]!r} can't be a name: that has 1 to 64 of the characters "
            f"A-Z a-z 0-9 _ - ., the first no - or ., the last no . (pattern {NAME})"
        )
    else:
        value = problem["input"]
        shown = "" if isinstance(value, Mapping | list | tuple) else f" = {value!r}"
        message = problem["msg"].removeprefix("Value error, ")
        text = f"{dotted(plain) or 'file'}{shown}: {message[0].lower()}{message[1:]}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{file}: {text}{more}"
