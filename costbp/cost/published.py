"""Predicted against published memory: every row that can be expressed is traced under the profile of
its source, and the others are named with the reason."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from costbp.config.catalog import ModelEntry
from costbp.config.costs import card_bytes
from costbp.config.entries import Strict
from costbp.config.load import overlaid
from costbp.config.methods import BackpropSpec, MethodEntry
from costbp.config.read import validate
from costbp.config.study import Plan
from costbp.config.yaml_file import read_yaml
from costbp.cost.bench import Bench
from costbp.cost.record import CostRecord
from costbp.errors import UserError, suggest

FOLDER = Path("config/published")
COLUMNS = ("source", "measure", "model", "dtype", "method", "batch", "seq", "unit", "value", "note")
UNITS = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
DTYPES = {"bf16": "bfloat16", "bf16-true": "bfloat16", "fp16": "float16", "fp32": "float32"}
LEAST = 0.02  # share of a row that a difference of two has to be


class Rule(Strict):
    """How rows of a source are expressed. Patterns match whole texts."""

    method: str = Field(description="Pattern of the row's method.")
    model: str = Field(".*", description="Pattern of the row's model.")
    dtype: str = Field(".*", description="Pattern of the row's dtype.")
    why: str | None = Field(None, description="Why it can't be expressed.")
    runs: str | None = Field(None, description="Name in methods.yaml.")
    profile: str | None = Field(None, description="Instead of the source's.")
    batch: int | None = Field(None, ge=1, description="Instead of the row's.")
    part: Literal["step", "forward", "perturb", "update", "weights"] = Field(
        "step", description="Of a step whose peak is meant; `weights`: what is there before it."
    )
    settings: dict[str, Any] = Field(
        {}, description="Keys of the model's entry; of the method's, of the profile's."
    )


class Publisher(Strict):
    """Where rows come from, and what they have in common."""

    name: str
    match: str = Field(description="Pattern of the rows' source.")
    why: str | None = Field(None, description="Why none can be expressed.")
    about: str = ""
    profile: str = Field("costbp", description="Name in profiles.yaml.")
    measure: Literal["allocated", "reserved", "driver"] = Field(
        "allocated", description="What was read: `driver` adds the context to what is reserved."
    )
    context: str = Field("0.5GB", description="Of the driver.")
    unit: Literal["GB", "GiB", "MB", "MiB"] = "GB"
    length: int = Field(512, ge=2, description="Tokens, where the row has no number.")
    absolute: bool = Field(True, description="Score the rows, not only their differences.")
    bounds: bool = Field(
        False, description="Lengths are bounds of many: differences are scored apart, too."
    )
    form: Literal["causal", "classifier"] = "causal"
    dtype: str | None = Field(None, description="Of the base, instead of the row's.")
    rules: tuple[Rule, ...] = ()


class Sources(Strict):
    sources: tuple[Publisher, ...]


@dataclass(frozen=True)
class Row:
    """A published figure and what is predicted for it, in bytes; or why nothing is.

    Attributes:
        settings: what it was run with, by name: what two rows differ in.
        rival: what the closed form that others use says.
    """

    source: str
    model: str
    method: str
    batch: str
    seq: str
    published: float
    predicted: float | None = None
    rival: float | None = None
    why: str = ""
    absolute: bool = True
    bounds: bool = False
    measure: str = "allocated"
    settings: Mapping[str, str] | None = None

    @property
    def error(self) -> float:
        """Relative; nan where nothing is predicted."""
        return float("nan") if self.predicted is None else self.predicted / self.published - 1


@dataclass(frozen=True)
class Pair:
    """Two rows of a source that differ in one thing, and their differences in bytes."""

    source: str
    model: str
    key: str
    values: tuple[str, str]
    published: float
    predicted: float
    bounds: bool = False

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of published measurements.

    Raises:
        UserError: the file can't be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)} (needed: {', '.join(COLUMNS)})")
    return rows


Watch = Callable[[Sequence[tuple[int, dict[str, str]]]], Iterable[tuple[int, dict[str, str]]]]


def predict(plan: Plan, path: Path, watch: Watch = iter) -> Iterator[Row]:
    """Each row of memory in a table, with what is predicted for it.

    Args:
        watch: is handed all numbered rows and hands them on, to show how far it is.

    Raises:
        UserError: a file can't be read, or a row holds no number.
    """
    file = FOLDER / "sources.yaml"
    content = {"sources": read_yaml(file)}
    sources = validate(Sources, content, [(file, content)]).sources
    models = read_yaml(FOLDER / "models.yaml")
    for number, row in watch(list(enumerate(read_rows(path), 2))):
        if row["unit"] not in UNITS:
            continue  # seconds
        try:
            value = float(row["value"])
        except ValueError as error:
            where = f"{path}, line {number}"
            raise UserError(f"{where}: value = '{row['value']}' is no number") from error
        source = next((s for s in sources if re.fullmatch(s.match, row["source"])), None)
        yield _predicted(plan, models, source, row, value)


def _predicted(
    plan: Plan, models: Mapping[str, Any], source: Publisher | None, row: Any, value: float
) -> Row:
    keys = {key: row[key] for key in ("model", "method", "batch", "seq")}
    if source is None:
        return Row(source=row["source"], published=value, why="no such source is known", **keys)
    published = value * UNITS[source.unit]
    made = {
        "bounds": source.bounds,
        "source": source.name,
        "published": published,
        "measure": source.measure,
        **keys,
    }
    rule = next((r for r in source.rules if _matches(r, row)), None)
    why = source.why or (rule.why if rule else "no rule expresses its method")
    if not why and row["model"] not in models:
        why = "the model's sizes are not known"
    batch = (rule.batch if rule else None) or _number(row["batch"])
    if not why and batch is None:
        why = "its batch is not stated"
    if why or rule is None or batch is None:
        return Row(why=why or "", **made)
    length = _number(row["seq"].replace("max_len", "")) or source.length
    try:
        record, method = _traced(plan, source, rule, row, models[row["model"]], batch, length)
    except UserError as error:  # the model can't have it
        return Row(why=str(error), **made)
    context = card_bytes(source.context) if source.measure == "driver" else 0
    rival = closed_form(models[row["model"]], rule, method, record) + context
    settings = {str(k): str(v) for k, v in rule.settings.items() if k != "train"}
    settings |= {f"train.{k}": str(v) for k, v in rule.settings.get("train", {}).items()}
    settings |= {"plan": str(rule.runs), "part": rule.part, "batch": str(batch)}
    settings |= {"length": str(length), "profile": rule.profile or source.profile}
    taken = record.allocated if source.measure == "allocated" else record.reserved
    predicted = float((taken or 0) + context)
    absolute = source.absolute
    return Row(predicted=predicted, rival=rival, settings=settings, absolute=absolute, **made)


def _matches(rule: Rule, row: Mapping[str, str]) -> bool:
    pairs = ((getattr(rule, name), row[name]) for name in ("method", "model", "dtype"))
    return all(re.fullmatch(pattern, text) for pattern, text in pairs)


def _number(text: str) -> int | None:
    found = re.fullmatch(r"\s*[<=~]*\s*(\d+)(/GPU)?\b.*", text)
    return int(found[1]) if found else None


def closed_form(
    config: Mapping[str, Any], rule: Rule, method: MethodEntry, record: CostRecord
) -> float:
    """Bytes as they are mostly estimated: weights, gradients, two moments, and in each block
    s b h (34 + 5 a s / h) bytes of activations, or 2 s b h where blocks are recomputed (Korthikanti et
    al. 2022, arXiv 2205.05198, equations 1 and 2); nothing of logits, loss, or the optimiser's copies."""
    trained = record.peak_by_category["adapters"]
    if rule.part != "step" or not isinstance(method.estimator, BackpropSpec):
        return float(record.weights_bytes + trained)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kept = 34 * hidden + 5 * heads * record.seq
    if method.estimator.plan == "per_block":
        kept = 2 * hidden
    moments = 0 if rule.settings.get("profile.optimizer") == "adafactor" else 2
    blocks = config["num_hidden_layers"]
    activations = record.batch * record.seq * blocks * kept
    return float(record.weights_bytes + (2 + moments) * trained + activations)


def _traced(
    plan: Plan, source: Publisher, rule: Rule, row: Any, config: Any, batch: int, length: int
) -> tuple[CostRecord, MethodEntry]:
    catalog = plan.catalog
    dtype = source.dtype or DTYPES.get(row["dtype"], "bfloat16")
    given = {
        "label": row["model"],
        "source": {"kind": "config", "form": source.form, "config": config, "dtype": dtype},
        "train": {"kind": "full"},
    }
    where = f"{FOLDER / 'sources.yaml'}: {source.name}: {rule.method}"
    entry = validate(ModelEntry, given, [(Path(where), given)])
    name = rule.runs or ""
    for kind, wanted, known in (
        ("runs", name, catalog.methods),
        ("profile", rule.profile or source.profile, catalog.profiles),
    ):
        if wanted not in known:
            raise UserError(f"{where}: {kind} = '{wanted}'; {suggest(wanted, known)}")
    method, profile = catalog.methods[name], catalog.profiles[rule.profile or source.profile]
    for prefix in ("", "method.", "profile."):
        own = {k.removeprefix(prefix): v for k, v in rule.settings.items() if _of(k) == prefix}
        if own and prefix == "method.":
            method = overlaid(method, own, where)
        elif own and prefix == "profile.":
            profile = overlaid(profile, own, where)
        elif own:
            entry = overlaid(entry, own, where)
    bench = Bench(entry, name=row["model"], profile=profile, classes=2)
    return bench.cost(name, method, batch, length, part=rule.part), method


def _of(key: str) -> str:
    """The prefix of a setting's key."""
    first = key.split(".")[0] + "."
    return first if first in ("method.", "profile.") else ""


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Every two rows of one source and model that differ in one setting; a difference below two
    hundredths of the larger figure is lost in its rounding."""
    found = []
    for one, other in itertools.combinations([r for r in rows if r.predicted is not None], 2):
        a, b = one.settings or {}, other.settings or {}
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        alike = (one.source, one.model) == (other.source, other.model) and len(keys) == 1
        apart = other.published - one.published
        large = abs(apart) >= LEAST * max(one.published, other.published)
        if alike and large and {a.get("part"), b.get("part")} == {"step"}:
            values = a.get(keys[0], "-"), b.get(keys[0], "-")
            guess = (other.predicted or 0) - (one.predicted or 0)
            about = one.source, one.model, keys[0], values
            found.append(Pair(*about, apart, guess, one.bounds))
    return found


@dataclass(frozen=True)
class Score:
    """How far predictions of one source are from what was published.

    Attributes:
        median, eighty: of absolute relative errors, and the 80th of a hundred.
        bias: median of signed ones.
        rival: median of the closed form's absolute ones; nan for differences.
    """

    name: str
    count: int
    median: float
    eighty: float
    bias: float
    rival: float


def scores(rows: Sequence[Row]) -> list[Score]:
    """Of each source whose rows are scored as they stand, and of all of them."""
    scored = [row for row in rows if row.predicted is not None and row.absolute]
    groups = {
        name: [r for r in scored if r.source == name] for name in {r.source: 0 for r in scored}
    }
    found = []
    for name, group in (groups | ({"all": scored} if len(groups) > 1 else {})).items():
        rivals = [abs((row.rival or 0) / row.published - 1) for row in group]
        found.append(_score(name, [row.error for row in group], rivals))
    return found


def difference_scores(found: Sequence[Pair]) -> list[Score]:
    """Of what two rows differ in, and of all differences; apart those of sources whose lengths are
    bounds."""
    exact = [pair for pair in found if not pair.bounds]
    groups = {key: [p for p in exact if p.key == key] for key in {p.key: 0 for p in exact}}
    groups["all"] = exact
    for source in {pair.source: 0 for pair in found if pair.bounds}:
        groups[f"{source}, bounds"] = [pair for pair in found if pair.source == source]
    return [
        _score(name, [p.error for p in group], [float("nan")])
        for name, group in groups.items()
        if group
    ]


def _score(name: str, errors: Sequence[float], rivals: Sequence[float]) -> Score:
    sizes = np.abs(errors)
    median, eighty = np.quantile(sizes, [0.5, 0.8])
    bias, rival = np.median(errors), np.median(rivals)
    return Score(name, len(errors), float(median), float(eighty), float(bias), float(rival))
