"""A catalog and a plan from their files, every reference between them checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel

from costbp.config.catalog import Catalog, LocalData, ModelEntry
from costbp.config.claims import Claims, Compared
from costbp.config.costs import Sweep
from costbp.config.entries import Strict
from costbp.config.groups import Names, load_groups
from costbp.config.insight import Trained
from costbp.config.methods import MethodEntry
from costbp.config.read import Loc, Sources, blame, dotted, laid_over, validate, value_at
from costbp.config.sources import FolderSource
from costbp.config.study import Plan, Study
from costbp.config.tuning import Choices, Tuned
from costbp.config.yaml_file import read_yaml
from costbp.errors import UserError, suggest
from costbp.files import read_cached

DEFAULT = Path("config/config.yaml")
Model = TypeVar("Model", bound=BaseModel)


def load_catalog(
    folder: Path, entries: Mapping[Any, Any] = MappingProxyType({}), where: Path = DEFAULT
) -> Catalog:
    """Read ``methods, models, tasks, budgets, assets`` from a catalog folder and check references.

    Args:
        entries: laid over the files' content, by kind.
        where: the file that they stand in.
    """
    paths = {kind: folder / f"{kind}.yaml" for kind in Catalog.model_fields}
    sources = [(path, {kind: read_yaml(path)}) for kind, path in paths.items()]
    if entries:
        sources.append((where, dict(entries)))
    catalog = validate(Catalog, laid_over(sources), sources)
    used = [("models", n, a) for n, m in catalog.models.items() for a in m.assets]
    used += [("tasks", n, t.asset) for n, t in catalog.tasks.items() if t.asset]
    for kind, name, asset in used:
        if asset not in catalog.assets:
            raise UserError(
                f"{paths[kind]}: {name}: asset '{asset}' is not in assets.yaml; "
                f"{suggest(asset, catalog.assets)}"
            )
    for name, task in catalog.tasks.items():
        if isinstance(task.loader, str) and task.loader not in task_modules():
            raise UserError(
                f"{paths['tasks']}: {name}.loader = '{task.loader}' is not a module of "
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
    choices: Choices


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
    try:
        return _load_plan(overlays, merged, base)
    except OSError as error:  # a name that no file can have, or a place that can't be read
        raise UserError(f"{base}: {error.filename}: {error.strerror}") from error


def _load_plan(overlays: Sequence[Path], merged: Mapping[str, Any] | None, base: Path) -> Plan:
    sources = [(path, read_yaml(path)) for path in dict.fromkeys([base, *overlays])]
    if empty := [path for path, content in sources if content == {}]:
        raise UserError(f"{empty[0]}: holds no keys; is it cut off?")
    data: Mapping[str, Any] = laid_over(sources)
    if merged is not None:
        if beyond := {key: value for key, value in merged.items() if data.get(key) != value}:
            sources.append((Path("--config"), beyond))
        data = merged
    study = validate(Study, data, sources)
    catalog = load_catalog(
        study.catalog, study.entries, blame(sources, ("entries",)) if study.entries else DEFAULT
    )
    names = Names(catalog, load_groups(study.catalog, catalog), study.catalog, sources)
    study = _resolved(study, names)
    _check_sweeps(study, catalog, sources)
    _check_paths(study, catalog, sources)
    tuned: Choices = {}
    if study.tuning.file.exists() and not study.tuning.first:
        content = read_yaml(study.tuning.file)
        tuned = validate(_TunedFile, content, [(study.tuning.file, content)]).choices
    claims = read_yaml(study.claims)
    plan = Plan(
        study=study,
        catalog=catalog,
        tuned=tuned,
        claims=validate(Claims, claims, [(study.claims, claims)]),
    )
    _check_tuning(plan, blame(sources, ("tuning",)))
    _check_objectives(plan, blame(sources, ("experiments",)))
    _check_claims(plan, blame(sources, ("experiments",)))
    return plan


def _check_paths(study: Study, catalog: Catalog, sources: Sources) -> None:
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
                if any(value_at(data, loc) is not None for _, data in sources):
                    where, place = str(blame(sources, loc)), dotted(loc)
                raise UserError(f"{where}: {place} = '{local.path}': no such file or folder")


def _resolved(study: Study, names: Names) -> Study:
    """The study with entries in place of groups; every name it holds is known and can stand there."""
    blocks = tuple(
        names.resolve(block, ("experiments", index), _not_trained)
        for index, block in enumerate(study.experiments)
    )
    costs = study.costs
    if costs is not None:
        costs = names.resolve(costs, ("costs",), _not_traced)
        sweeps = {
            name: names.resolve(sweep, ("costs", "sweeps", name), _not_traced)
            for name, sweep in costs.sweeps.items()
        }
        fits = costs.fits and names.resolve(costs.fits, ("costs", "fits"), _not_traced)
        costs = costs.model_copy(update={"sweeps": sweeps, "fits": fits})
    for name, problem in study.insight.problems.items() if study.insight else ():
        if isinstance(problem, Trained):
            loc: Loc = ("insight", "problems", name)
            names.check("models", (problem.model,), (*loc, "model"), _not_trained)
            names.check("tasks", (problem.task,), (*loc, "task"), _not_trained)
    return study.model_copy(update={"experiments": blocks, "costs": costs})


def _not_trained(model: ModelEntry) -> str:
    return (
        ""
        if model.trains_here
        else f"serves `costbp cost` and `costbp fit` alone (source {model.source.kind}, train "
        f"{model.train.kind})"
    )


def _not_traced(model: ModelEntry) -> str:
    kind = model.source.kind
    return "" if kind == "config" else f"can't be traced at full size (source {kind}, not config)"


def _check_sweeps(study: Study, catalog: Catalog, sources: Sources) -> None:
    """Every entry of a sweep can have its values."""
    if study.costs is None:
        return
    for name, sweep in study.costs.sweeps.items():
        methods = {key: catalog.methods[key] for key in sweep.methods or study.costs.methods}
        where = f"{blame(sources, ('costs', 'sweeps', name))}: costs.sweeps.{name}"
        for value in sweep.values:
            swept(catalog.models[sweep.model], methods, sweep, value, where)


def own_choices(plan: Plan) -> Choices:
    """The choices of the study's own trials, as far as they have been made."""
    found: Choices = {}
    for cell in plan.cells():
        tuned = read_cached(plan.trials_file(cell), Tuned.model_validate_json)
        if tuned is not None:
            methods = found.setdefault(cell.model, {}).setdefault(cell.task, {})
            methods.setdefault(cell.method, {})[cell.budget] = tuned
    return found


def settled(plan: Plan) -> Plan:
    """The plan with the choices that it runs by: where it tunes first, those of its own trials."""
    return plan.model_copy(update={"tuned": own_choices(plan)}) if plan.study.tuning.first else plan


def _check_tuning(plan: Plan, file: Path) -> None:
    """The first round has room for every rate, and trials have a seed of their own."""
    tuning, study = plan.study.tuning, plan.study
    if tuning.seed in {*study.seeds, *(s for b in study.experiments for s in b.seeds or ())}:
        raise UserError(f"{file}: tuning.seed = {tuning.seed} is one of the study's seeds")
    for name in dict.fromkeys(cell.method for cell in plan.cells()):
        method = plan.catalog.methods[name]
        if not (roots := tuning.roots(method)):
            raise UserError(
                f"{file}: tuning.rates has none for {', '.join(method.optimizers)}, and {name} "
                "takes no other optimiser"
            )
        if len(roots) > 2**tuning.total:
            raise UserError(
                f"{file}: tuning.total = {tuning.total} makes {2**tuning.total} trials in the first "
                f"round, and {name} has {len(roots)} rates; raise it, or try fewer rates"
            )
    for cell in plan.cells() if tuning.first else ():
        budget = plan.catalog.budgets[cell.budget].forward_units or math.inf
        least = plan.catalog.methods[cell.method].closed_form() or 0.0
        if budget / 2**tuning.total < least:
            raise UserError(
                f"{file}: tuning.first: a trial of {cell.method} gets {budget / 2**tuning.total:g} "
                f"forward units of {cell.budget}, and a step takes {least:g}; raise the budget"
            )


def _check_objectives(plan: Plan, file: Path) -> None:
    """No method differentiates what is piecewise constant."""
    for cell in plan.cells():
        task, method = plan.catalog.tasks[cell.task], plan.catalog.methods[cell.method]
        if not task.differentiable and method.differentiates:
            raise UserError(
                f"{file}: experiments: method '{cell.method}' can't be trained on task '{cell.task}': "
                f"the derivative of its objective {task.objective} is zero almost everywhere; use "
                "methods of differences there, and this one on a task of the same data with objective "
                "cross_entropy"
            )


def _check_claims(plan: Plan, file: Path) -> None:
    """The study has the one reference that claims need, and the catalog the methods they name."""
    known = plan.catalog.methods
    used = dict.fromkeys(cell.method for cell in plan.cells())
    if len(found := [name for name in used if known[name].reference]) != 1:
        raise UserError(
            f"{file}: experiments: claims need exactly one method with `reference: true` "
            f"({', '.join(name for name in known if known[name].reference) or 'the catalog has none'})"
            f", found {', '.join(found) or 'none'}"
        )
    for name, claim in plan.claims.items():
        for kind, key, entry in _named(claim):
            entries = getattr(plan.catalog, kind)
            if entry not in entries:
                raise UserError(
                    f"{plan.study.claims}: {name}.{key}: '{entry}' is not in "
                    f"{plan.study.catalog / kind}.yaml; {suggest(entry, entries)}"
                )
        for model in getattr(getattr(claim, "traced", None), "models", ()):
            if why := _not_traced(plan.catalog.models[model]):
                raise UserError(f"{plan.study.claims}: {name}.traced.models: '{model}' {why}")
        bases = getattr(claim, "series", ()) if getattr(claim, "varied", "d") == "d" else ()
        for models in bases:
            first, *rest = (plan.catalog.models[model].source for model in models)
            if any(source != first for source in rest):
                raise UserError(
                    f"{plan.study.claims}: {name}.series: {', '.join(models)} must share one source, so "
                    "that d alone differs"
                )


def _named(claim: Any) -> Iterator[tuple[str, str, str]]:
    """What a claim names of the catalog: (kind, key of the claim, entry)."""
    parts = {"": claim, "traced.": getattr(claim, "traced", None)}
    for prefix, part in parts.items():
        for kind in ("models", "tasks", "methods"):
            yield from ((kind, prefix + kind, name) for name in getattr(part, kind, None) or ())
    for names in getattr(claim, "series", ()):
        yield from (("models", "series", name) for name in names)
    if isinstance(claim, Compared):
        for pair in claim.baselines.items():
            yield from (("methods", "baselines", name) for name in pair)
