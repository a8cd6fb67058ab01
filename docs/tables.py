"""Writes the tables of keys in config.md and of methods in methods.md: `python docs/tables.py`.

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is generated, from the field
descriptions of the pydantic class NAME or, for ``methods``, from the catalog. A test compares.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from costbp.config import load_plan
from costbp.config.claims import Compared, Stated
from costbp.config.entries import Entry
from costbp.config.insight import Measured
from costbp.config.methods import BackpropSpec, MethodEntry, ProjectedSpec
from costbp.config.shares import Shares
from costbp.config.sources import Source

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    import_module(f"costbp.config.{name}")
    for name in (
        *("catalog", "claims", "costs", "evaluation", "insight", "loaders", "methods", "optimizer"),
        *("parts", "profiles", "resources", "sources", "study", "trainables", "tuning"),
    )
]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
WORDS = {"object": "mapping", "string": "text", "boolean": "true, false", "null": "null"}


def config_classes() -> dict[str, type[BaseModel]]:
    """The pydantic classes of the configuration, by name."""
    return {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, BaseModel)
    }


# --- keys ------------------------------------------------------------------------------------------


def table_of(model: type[BaseModel]) -> str:
    """A row for each key of a class: what it may hold, its default, what it means."""
    shared = {
        name
        for base in (Entry, Source, Stated, Compared, Measured)
        if issubclass(model, base) and model is not base
        for name, field in base.model_fields.items()
        if model.model_fields[name].default == field.default
    }
    rows = []
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        if name in shared:
            continue
        rule = schema["properties"][field.alias or name]
        found = list(dict.fromkeys(_allowed(rule, schema.get("$defs", {}))))
        kinds = all(word.startswith("`kind:") for word in found)
        allowed = (", " if kinds else " or ").join(found)
        if not field.is_required() and field.default is None:
            allowed = allowed.removesuffix(" or null")
        if name == "kind" and "const" in rule:
            continue  # what the heading says
        default = "required" if field.is_required() else _default(rule.get("default"))
        rows.append((f"`{name}`", allowed, default, field.description or ""))
    return _markdown(("key", "type, allowed", "default", "meaning"), rows)


def _allowed(rule: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    """What a JSON schema allows, in words."""
    options = rule.get("anyOf") or rule.get("oneOf")
    if options:
        for option in options:
            yield from _allowed(option, parts)
    elif "$ref" in rule:
        part = parts[rule["$ref"].rsplit("/", 1)[1]]
        kind = part.get("properties", {}).get("kind", {})
        names = [kind["const"]] if "const" in kind else kind.get("enum", [])
        yield ", ".join(f"`kind: {name}`" for name in names) or "mapping"
    elif "const" in rule or "enum" in rule:
        yield ", ".join(f"`{value}`" for value in rule.get("enum", [rule.get("const")]))
    elif rule.get("type") == "array":
        inner = " or ".join(_allowed(rule.get("items", {}), parts))
        least = ", at least one" if rule.get("minItems") == 1 else ""
        several = re.sub(r"^\w+(?= [<>])|(?<!^)$", r"\g<0>s", inner, count=1)
        yield f"list of {several}{least}" if inner else "list"
    else:
        limits = [f"{sign} {rule[key]:g}" for key, sign in LIMITS.items() if key in rule]
        limits = [limit.replace(f"{2**63:g}", "2^63") for limit in limits]
        word = WORDS.get(rule.get("type", ""), rule.get("format") or rule.get("type") or "any")
        pattern = f" matching `{rule['pattern']}`" if "pattern" in rule else ""
        path = rule.get("format") == "path"
        yield " and ".join([("path" if path else word) + pattern, *limits]).replace(" and ", " ", 1)


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "see below" if value else "empty"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "empty" if value in ("", []) else f"`{value}`"


# --- methods ---------------------------------------------------------------------------------------


def method_table() -> str:
    """A row for each method of the catalog: its parts, its forward units in closed form, its source."""
    tensors, blocks = 26, 6
    rows = []
    for name, entry in load_plan(base=ROOT / "config/config.yaml").catalog.methods.items():
        units = entry.closed_form(Shares(tensors=tensors, blocks=blocks))
        parts = "; ".join(_parts(entry))
        rows.append((f"`{name}`", entry.label, parts, f"{units:.3g}", entry.citation or ""))
    return _markdown(("name", "label", "composition", "forward units", "source"), rows)


def _parts(entry: MethodEntry) -> Iterator[str]:
    spec = entry.estimator
    if isinstance(spec, BackpropSpec):
        yield f"backprop, plan `{spec.plan}`"
    elif isinstance(spec, ProjectedSpec):
        yield spec.oracle.kind + _settings(spec.oracle)
        yield f"{spec.directions.kind}{_settings(spec.directions)}, K = {spec.directions.count}"
        if spec.groups != 1:
            yield "for each example" if spec.groups == "examples" else f"{spec.groups} groups"
        if spec.scale != "unbiased":
            yield f"scale `{spec.scale}`"
    else:
        yield spec.kind + _settings(spec)
    if entry.accumulate > 1:
        yield f"{entry.accumulate} micro-batches"
    if entry.svrg is not None:
        yield f"SVRG{_settings(entry.svrg)}"
    if entry.sign:
        yield "signs"


def _settings(spec: BaseModel) -> str:
    """What is set beside the defaults, as `` (every 50, group 2)``."""
    given = spec.model_dump(exclude_defaults=True, exclude={"kind", "count", "oracle"})
    words = ", ".join(f"{key} {value}" for key, value in given.items())
    return f" ({words})" if words else ""


# --- pages -----------------------------------------------------------------------------------------


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def pages() -> dict[Path, str]:
    """The pages with generated tables, as they should stand."""
    classes = config_classes()

    def filled(found: re.Match[str]) -> str:
        name = found[2]
        text = method_table() if name == "methods" else table_of(classes[name])
        return found[1] + text + found[3]

    files = (ROOT / "docs" / name for name in ("config.md", "methods.md"))
    return {path: MARKED.sub(filled, path.read_text(encoding="utf-8")) for path in files}


if __name__ == "__main__":
    for page, text in pages().items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT), file=sys.stderr)
