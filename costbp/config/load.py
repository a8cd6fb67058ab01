"""Reading configuration: overlays, cross references, and errors that a user can act on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from costbp.config.catalog import Catalog, LocalData, ModelEntry
from costbp.config.costs import Sweep
from costbp.config.entries import Strict
from costbp.config.methods import MethodEntry
from costbp.config.optimizer import OptimizerSpec
from costbp.config.sources import FolderSource
from costbp.config.study import Plan, Study
from costbp.errors import UserError, suggest

DEFAULT = Path("config/config.yaml")
Model = TypeVar("Model", bound=BaseModel)
Loc = tuple[int | str, ...]


def read_yaml(path: Path) -> Any:
    """Parse one YAML file.

    Raises:
        UserError: the file is missing or is not YAML; names file and line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (run from the repository's root)") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}:{where} is not valid YAML ({getattr(error, 'problem', error)})"
        ) from error


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


def dotted(loc: Loc) -> str:
    """``experiments[0].methods[2]`` from pydantic's location tuple."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _value_at(data: Any, loc: Loc) -> Any:
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
        if _value_at(data, (*plain, part)) is not None or index == len(loc) - 1:
            plain = (*plain, part)
    return plain


def _fields_at(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys allowed at ``loc``, found by walking the models' annotations."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        tagged = [m for m in models if "kind" in m.model_fields and _may_be(m, part)]
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


def _may_be(model: type[BaseModel], kind: int | str) -> bool:
    return kind in get_args(model.model_fields["kind"].annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _blame(sources: Sequence[tuple[Path, Any]], loc: Loc) -> Path:
    """The last file that sets the key (or the nearest parent of it)."""
    for depth in range(len(loc), 0, -1):
        for path, data in reversed(sources):
            if _value_at(data, loc[:depth]) is not None:
                return path
    return sources[-1][0]


def validate(model: type[Model], data: Any, sources: Sequence[tuple[Path, Any]]) -> Model:
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
    model: type[BaseModel],
    data: Any,
    sources: Sequence[tuple[Path, Any]],
    problem: Any,
    count: int,
) -> str:
    loc: Loc = tuple(problem["loc"])
    plain = _plain(data, loc)
    file, kind, context = _blame(sources, plain), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(model, loc[:-1])
        text = f"unknown key '{dotted(plain)}'; {suggest(loc[-1], allowed)}"
    elif kind == "missing":
        text = f"key '{dotted(plain)}' is missing"
    elif kind in ("literal_error", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags"))
        allowed = [part.strip(" '\"") for part in expected.replace(" or ", ",").split(",")]
        value = context.get("tag", problem["input"])
        text = f"{dotted(plain)} = '{value}' is not known; {suggest(value, allowed)}"
    else:
        value = problem["input"]
        shown = "" if isinstance(value, Mapping | list | tuple) else f" = {value!r}"
        message = problem["msg"].removeprefix("Value error, ")
        text = f"{dotted(plain) or 'file'}{shown}: {message[0].lower()}{message[1:]}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{file}: {text}{more}"


def load_catalog(
    folder: Path, entries: Mapping[Any, Any] = MappingProxyType({}), where: Path = DEFAULT
) -> Catalog:
    """Read ``methods, models, tasks, budgets, assets`` from a catalog folder and check references.

    Args:
        entries: laid over the files' content, by kind.
        where: the file that they stand in.
    """
    data, sources = {}, {}
    for kind in Catalog.model_fields:
        path = folder / f"{kind}.yaml"
        sources[kind] = path
        data[kind] = read_yaml(path)
    wrapped = [(sources[kind], {kind: data[kind]}) for kind in data]
    if entries:
        data = overlay(data, entries)
        wrapped.append((where, dict(entries)))
    catalog = validate(Catalog, data, wrapped)
    used = [("models", n, a) for n, m in catalog.models.items() for a in m.assets]
    used += [("tasks", n, t.asset) for n, t in catalog.tasks.items() if t.asset]
    for kind, name, asset in used:
        if asset not in catalog.assets:
            raise UserError(
                f"{sources[kind]}: {name}: asset '{asset}' is not in assets.yaml; "
                f"{suggest(asset, catalog.assets)}"
            )
    for name, task in catalog.tasks.items():
        if isinstance(task.loader, str) and task.loader not in task_modules():
            raise UserError(
                f"{sources['tasks']}: {name}.loader = '{task.loader}' is not a module of "
                f"costbp/tasks; {suggest(task.loader, task_modules())}"
            )
    return catalog


@functools.cache
def task_modules() -> list[str]:
    """Names of the modules that define a task."""
    files = sorted((Path(__file__).parent.parent / "tasks").glob("[!_]*.py"))
    return [file.stem for file in files if "\nTASK = " in file.read_text(encoding="utf-8")]


def overlaid(entry: Model, settings: Mapping[str, Any], source: str) -> Model:
    """``entry`` with values laid over it at dotted keys.

    Raises:
        UserError: a key whose parent isn't there, or a value that isn't allowed; names ``source``.
    """
    values = entry.model_dump(mode="json")
    for key, value in settings.items():
        *parents, last = key.split(".")
        place: Any = values
        for part in parents:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise UserError(f"{source} {key}: no such key; {suggest(parents[0], values)}")
        place[last] = value
    return validate(type(entry), values, [(Path(source), values)])


OF_METHODS = "method."  # prefix of keys that belong to the methods' entries


def swept(
    model: ModelEntry, methods: dict[str, MethodEntry], sweep: Sweep, value: int, source: str
) -> tuple[ModelEntry, dict[str, MethodEntry], dict[str, int]]:
    """Model, methods and shape of the batch at one value of a sweep.

    Raises:
        UserError: an entry can't have this value; names ``source``.
    """
    if sweep.key in ("batch", "seq"):
        return model, methods, {sweep.key: value}
    if sweep.key.startswith(OF_METHODS):
        key = sweep.key.removeprefix(OF_METHODS)
        return model, {n: overlaid(m, {key: value}, source) for n, m in methods.items()}, {}
    return overlaid(model, {sweep.key: value}, source), methods, {}


class _TunedFile(Strict):
    about: str = ""
    choices: dict[str, dict[str, dict[str, OptimizerSpec]]]


def load_plan(
    overlays: Sequence[Path] = (), merged: Mapping[str, Any] | None = None, base: Path = DEFAULT
) -> Plan:
    """The plan of a study: ``base`` with ``overlays`` on top, its catalog and its tuned choices.

    Args:
        overlays: configuration files laid over ``base`` in order.
        merged: Snakemake's already merged configuration; replaces the files' content, the files
            then only serve to say where a mistake stands.
        base: the default study.

    Raises:
        UserError: any mistake, in one line naming file, key, value and the allowed values.
    """
    sources = [(path, read_yaml(path)) for path in dict.fromkeys([base, *overlays])]
    data: Mapping[str, Any] = {}
    for path, content in sources:
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: must hold keys and values, not a {type(content).__name__}")
        data = overlay(data, content)
    if merged is not None:
        data = merged
        if any(_value_at(data, (key,)) != value for key, value in _flatten(sources).items()):
            sources.append((Path("--config"), _beyond(sources, merged)))
    study = validate(Study, data, sources)
    catalog = load_catalog(
        study.catalog, study.entries, _blame(sources, ("entries",)) if study.entries else DEFAULT
    )
    for index, block in enumerate(study.experiments):
        for kind in Catalog.model_fields:
            for place, name in enumerate(getattr(block, kind, ())):
                if name not in getattr(catalog, kind):
                    loc = ("experiments", index, kind, place)
                    raise UserError(
                        f"{_blame(sources, loc)}: {dotted(loc)} = '{name}' is not in "
                        f"{study.catalog / kind}.yaml; {suggest(name, getattr(catalog, kind))}"
                    )
        for place, name in enumerate(block.models):
            model = catalog.models[name]
            if not model.trains_here:
                loc = ("experiments", index, "models", place)
                usable = [key for key, entry in catalog.models.items() if entry.trains_here]
                raise UserError(
                    f"{_blame(sources, loc)}: {dotted(loc)} = '{name}' serves `costbp cost` and "
                    f"`costbp fit` alone (source {model.source.kind}, train {model.train.kind}); "
                    f"allowed: {', '.join(usable)}"
                )
    _check_costs(study, catalog, sources)
    _check_paths(study, catalog, sources)
    tuned = {}
    if study.tuning.file.exists():
        content = read_yaml(study.tuning.file)
        tuned = validate(_TunedFile, content, [(study.tuning.file, content)]).choices
    plan = Plan(study=study, catalog=catalog, tuned=tuned)
    _check_trials(plan)
    return plan


def _check_paths(study: Study, catalog: Catalog, sources: Sequence[tuple[Path, Any]]) -> None:
    """What the study's models and tasks read from this machine is there."""
    for kind in ("models", "tasks"):
        for name in dict.fromkeys(n for block in study.experiments for n in getattr(block, kind)):
            entry = getattr(catalog, kind)[name]
            local = entry.base if kind == "models" else entry.data
            if isinstance(local, FolderSource | LocalData) and not Path(local.path).exists():
                key: Loc = ("data",)
                if kind == "models":
                    key = ("source",) if local is entry.source else ("source", "base")
                loc: Loc = ("entries", kind, name, *key, "path")
                where, place = f"{study.catalog / kind}.yaml", dotted(loc[2:])
                if any(_value_at(data, loc) is not None for _, data in sources):
                    where, place = str(_blame(sources, loc)), dotted(loc)
                raise UserError(f"{where}: {place} = '{local.path}': no such file or folder")


def _check_costs(study: Study, catalog: Catalog, sources: Sequence[tuple[Path, Any]]) -> None:
    """Every name under ``costs`` is in the catalog."""
    if study.costs is None:
        return
    parts: dict[Loc, Any] = {("costs",): study.costs}
    if study.costs.fits is not None:
        parts["costs", "fits"] = study.costs.fits
    for name, sweep in study.costs.sweeps.items():
        parts["costs", "sweeps", name] = sweep
    for loc, part in parts.items():
        models = getattr(part, "models", None) or (part.model,)
        for kind, names in (("models", models), ("methods", part.methods or ())):
            for name in names:
                if name not in getattr(catalog, kind):
                    raise UserError(
                        f"{_blame(sources, loc)}: {dotted((*loc, kind))}: '{name}' is not in "
                        f"{study.catalog / kind}.yaml; {suggest(name, getattr(catalog, kind))}"
                    )
                if kind == "models" and catalog.models[name].source.kind != "config":
                    usable = [k for k, m in catalog.models.items() if m.source.kind == "config"]
                    raise UserError(
                        f"{_blame(sources, loc)}: {dotted((*loc, kind))}: '{name}' can't be traced "
                        f"at full size (source {catalog.models[name].source.kind}, not config); "
                        f"allowed: {', '.join(usable)}"
                    )
    for name, sweep in study.costs.sweeps.items():
        methods = {key: catalog.methods[key] for key in sweep.methods or study.costs.methods}
        where = f"{_blame(sources, ('costs', 'sweeps', name))}: costs.sweeps.{name}"
        for value in sweep.values:
            swept(catalog.models[sweep.model], methods, sweep, value, where)


def _check_trials(plan: Plan) -> None:
    """Fairness: every method of a study has the same number of trials."""
    counts = {cell.method: len(plan.catalog.methods[cell.method].trials) for cell in plan.cells()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(
            f"{plan.study.catalog}/methods.yaml: methods of one study need the same number of "
            f"tuning trials, found {listed}"
        )


def _flatten(sources: Sequence[tuple[Path, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _, content in sources:
        data = overlay(data, content)
    return data


def _beyond(sources: Sequence[tuple[Path, Any]], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level keys of ``merged`` that no file accounts for."""
    known = _flatten(sources)
    return {key: value for key, value in merged.items() if known.get(key) != value}
