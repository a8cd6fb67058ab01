"""A YAML file as plain values. What YAML would accept in silence, or with a traceback, is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from costbp.errors import UserError

# libyaml, where it is built in, is ten times as fast
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RESOLVER, NUMBERS = yaml.resolver.Resolver(), yaml.constructor.SafeConstructor()
DEEPEST = 50  # levels; Python's own parts of the reader recurse
MOST = 200_000  # values, with aliases written out
TAG = "tag:yaml.org,2002:"
PLAIN = {TAG + name for name in ("str", "int", "float", "bool", "null", "merge", "map", "seq")}
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # nor in XML
LONGEST_INT = 19  # characters: what takes more fits no 64 bits


def read_yaml(path: Path) -> Any:
    """Parse one YAML file; an empty one has no keys.

    Raises:
        UserError: the file is missing, isn't YAML of plain values, or has a key twice in a mapping;
            names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check(path, text)
        found = yaml.load(text, Loader=LOADER)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (run from the repository's root)") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not text in UTF-8 (byte {error.start + 1}); save it in UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a key that is no date, say
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{path}:{where} is not valid YAML ({problem})") from error
    return {} if found is None else found


@dataclass
class _Open:
    """A mapping or list that is being read."""

    anchor: str | None
    mapping: bool
    children: int = 0  # of a mapping keys and values, in turn
    size: int = 1  # values, with aliases written out
    lines: dict[Any, int] = field(default_factory=dict)  # of its keys
    key: str = ""  # the last of them


def _check(path: Path, text: str) -> None:
    """Refuse a key that stands twice in a mapping, of which YAML keeps the last; values that are no
    text, number, boolean, list or mapping; and what has no end."""
    sizes: dict[str | None, int] = {}
    scalars: dict[str | None, tuple[str, str]] = {}
    inside: list[_Open] = []
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            ended = inside.pop()
            sizes[ended.anchor] = ended.size
            if inside:
                inside[-1].size += ended.size
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        mark: Any = event.start_mark
        line, given = mark.line + 1, getattr(event, "tag", None)
        where = ".".join(part.key for part in inside if part.key) or "file"
        where = f"{path}: {where}, line {line}:"
        scalar, size = None, 0
        if isinstance(event, yaml.AliasEvent):
            scalar = scalars.get(event.anchor)
            holds_itself = any(part.anchor == event.anchor for part in inside)
            size = MOST if holds_itself else sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            tag = given or RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
            scalar, size = (tag, event.value), 1
            scalars[event.anchor] = scalar
            if why := _wrong(tag, event.value):
                raise UserError(f"{where} {event.value[:60]!r} {why}")
        elif given is not None and given not in PLAIN:
            raise UserError(f"{where} the tag {given} is not known here")
        if inside:
            above = inside[-1]
            if above.mapping and above.children % 2 == 0 and scalar is not None:
                if scalar in above.lines:
                    raise UserError(
                        f"{path}: key '{scalar[1]}' stands twice in one mapping, at lines "
                        f"{above.lines[scalar]} and {line}; keep one"
                    )
                above.lines[scalar], above.key = line, scalar[1]
            above.children += 1
            above.size += size
            if above.size > MOST:
                raise UserError(f"{where} aliases (*name) make more than {MOST:,} values")
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(inside) > DEEPEST:
                raise UserError(f"{where} more than {DEEPEST} levels")


def _wrong(tag: str, value: str) -> str:
    """Why a scalar can't stand in a file of ours; empty where it can."""
    if tag not in PLAIN:
        return f"is read as {tag.removeprefix(TAG)}; put it in quotes"
    if tag == f"{TAG}int" and len(value) > LONGEST_INT:
        return "is too large a number"
    if tag == f"{TAG}float" and not math.isfinite(
        NUMBERS.construct_yaml_float(yaml.ScalarNode(tag, value))
    ):
        return "is no finite number"
    if UNSHOWN.search(value):
        return "holds a character that can't be printed"
    return ""
