"""A study (what is compared) and the run spec (one seed of one experiment, frozen)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from costbp.config.catalog import (
    BudgetEntry,
    Catalog,
    Fetchable,
    HubData,
    LocalData,
    ModelEntry,
    TaskEntry,
    state,
)
from costbp.config.claims import Claims
from costbp.config.costs import Costs
from costbp.config.entries import EntryName, Seed, Strict, short_hash
from costbp.config.evaluation import Evaluation
from costbp.config.insight import Insight
from costbp.config.methods import MethodEntry
from costbp.config.optimizer import OptimizerSpec
from costbp.config.resources import Paths, Resources
from costbp.config.sources import TRACED, ConfigSource, FolderSource, HubSource
from costbp.config.tuning import Choice, Choices, Setting, Trial, Tuned, Tuning, with_eps
from costbp.files import digest

FORMAT = 9  # raised when the meaning of a run changes, so that old records are not mistaken for new
LONGEST = 200  # characters of a file's name, which a file system has 255 for
COSTS = 4  # the same for what is measured of a step's cost


class Cell(NamedTuple):
    """One experiment: the four names that multiply."""

    model: str
    task: str
    method: str
    budget: str

    def __str__(self) -> str:
        return "/".join(self)


class Block(Strict):
    """A block of experiments: the product of its lists."""

    models: tuple[str, ...] = Field(min_length=1, description="Names in models.yaml.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Names in tasks.yaml.")
    methods: tuple[str, ...] = Field(
        min_length=1, description="Names in methods.yaml, or groups (groups.yaml)."
    )
    budgets: tuple[str, ...] = Field(min_length=1, description="Names in budgets.yaml.")
    seeds: tuple[Seed, ...] | None = Field(
        None, min_length=1, description="Seeds of this block; default: the study's."
    )


class Study(Strict):
    """What a configuration file holds."""

    study: EntryName = Field(description="Name: folder under results/ and logs/.")
    description: str = Field("", description="Shown at the top of the report.")
    scale: Literal["reduced", "full"] = Field(
        "reduced", description="`full`: *verified*, *falsified*; else *toy*."
    )
    catalog: Path = Field(Path("config/catalog"), description="Folder of the catalog.")
    claims: Path = Field(Path("config/claims.yaml"), description="Claims to be tested.")
    trace_claims: bool = Field(
        True, description="Trace the full-size steps that claims ask for, about a minute."
    )
    seeds: tuple[Seed, ...] = Field(min_length=1, description="One run per experiment and seed.")
    experiments: tuple[Block, ...] = Field(min_length=1, description="Products of names.")
    evaluation: Evaluation = Field(description="When runs are scored, and when they diverge.")
    tuning: Tuning = Field(description="How learning rates are chosen.")
    paths: Paths = Field(Paths(), description="Folders.")
    resources: Resources = Field(Resources(), description="What a training job asks for.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto`: a GPU if there is one."
    )
    start_unfit: bool = Field(
        False, description="Start runs although their traced memory exceeds the device's."
    )
    costs: Costs | None = Field(None, description="What `snakemake costs` traces.")
    insight: Insight | None = Field(None, description="What `snakemake insight` measures.")
    entries: dict[Literal["methods", "models", "tasks", "budgets"], dict[str, dict[str, Any]]] = (
        Field(
            default_factory=dict,
            description="Laid over the catalog's entries, by kind and name: other data, sizes, paths.",
        )
    )


class RunSpec(Strict):
    """Everything that decides the numbers of one run. Its hash names the run."""

    cell: tuple[str, str, str, str]
    model: ModelEntry
    task: TaskEntry
    method: MethodEntry
    budget: BudgetEntry
    optimizer: OptimizerSpec
    evaluation: Evaluation
    seed: int
    assets: dict[str, str] = Field(
        description="What is read -> its state: checksum, commit of the hub, digest of local files."
    )

    def identity(self) -> dict[str, Any]:
        entries = {name: getattr(self, name) for name in ("model", "task", "method", "budget")}
        return {
            "format": FORMAT,
            **{name: entry.identity() for name, entry in entries.items()},
            "optimizer": self.optimizer.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "seed": self.seed,
            "assets": self.assets,
        }

    @property
    def hash(self) -> str:
        return short_hash(self.identity())

    def folder(self, store: Path) -> Path:
        """The run's folder in the store."""
        return store.joinpath(*self.cell, f"seed={self.seed}-{self.hash}")


class Plan(Strict):
    """A validated study together with its catalog and tuned choices: what every command works on."""

    study: Study
    catalog: Catalog
    tuned: Choices = Field(default_factory=dict)
    claims: Claims = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.study.study

    @property
    def results(self) -> Path:
        return self.study.paths.results / self.name

    @property
    def reference(self) -> str:
        """The method of the study that claims compare the others with."""
        used = (cell.method for cell in self.cells())
        return next(name for name in used if self.catalog.methods[name].reference)

    def cells(self) -> Iterator[Cell]:
        """Every experiment once, in the order of the configuration."""
        found = (
            Cell(model, task, method, budget)
            for block in self.study.experiments
            for model, task, budget, method in product(
                block.models, block.tasks, block.budgets, block.methods
            )
        )
        yield from dict.fromkeys(found)

    def pairs(self) -> dict[tuple[str, str], list[str]]:
        """(model, task) -> the methods the study runs on it."""
        pairs: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells():
            methods = pairs.setdefault((cell.model, cell.task), [])
            if cell.method not in methods:
                methods.append(cell.method)
        return pairs

    def jobs(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """The study's training jobs: (model, task, budget, methods). Methods of one pair and budget
        share jobs of about equal length, of at most ``resources.methods_per_job`` each."""
        methods: dict[tuple[str, str, str], list[str]] = {}
        for cell in self.cells():
            methods.setdefault((cell.model, cell.task, cell.budget), []).append(cell.method)
        for names, found in methods.items():
            count = -(-len(found) // self.study.resources.methods_per_job)
            while max(len("+".join(found[n::count])) for n in range(count)) > LONGEST:
                count += 1
            for number in range(count):
                yield (*names, tuple(found[number::count]))

    def assets(self, *, insight: bool = False) -> dict[str, Fetchable]:
        """All that has to be fetched for the study, by the name of its folder; for ``insight``, too."""
        found: dict[str, Fetchable] = {}
        further = self.study.insight.pairs if insight and self.study.insight else ()
        for model, task in (*self.pairs(), *further):
            found |= self.to_fetch(model, task)
        return dict(sorted(found.items()))

    def to_fetch(self, model: str, task: str) -> dict[str, Fetchable]:
        """What has to be fetched for one pair, by the name of its folder."""
        entry, data = self.catalog.models[model], self.catalog.tasks[task]
        names = [*entry.assets, *([data.asset] if data.asset else [])]
        found: dict[str, Fetchable] = {name: self.catalog.assets[name] for name in names}
        for hub in (entry.repository, data.data if isinstance(data.data, HubData) else None):
            if hub is not None:
                found[hub.folder] = hub
        return found

    def assets_of(self, model: str, task: str) -> dict[str, str]:
        """What a pair reads and in which state: checksums of carriers, commits of the hub, digests
        of local files and folders."""
        found = {name: state(what) for name, what in self.to_fetch(model, task).items()}
        for local in (self.catalog.models[model].base, self.catalog.tasks[task].data):
            if isinstance(local, FolderSource | LocalData):
                found[local.path] = digest(Path(local.path))
        return found

    def prepared(self, model: str, task: str) -> Path:
        """Where the pair's encoded splits are cached. Models that share source and form share it."""
        entry, data = self.catalog.models[model], self.catalog.tasks[task]
        key = {
            "format": FORMAT,
            "source": entry.source.model_dump(mode="json"),
            "reads": entry.reads,
            "blocks": getattr(entry.train, "blocks", None) if entry.reads == "states" else None,
            "words": entry.head == "label_words",
            "task": data.model_copy(update={"batch_size": 1}).identity(),
            "assets": self.assets_of(model, task),
        }
        return self.study.paths.cache / "prepared" / f"{task}-{short_hash(key)}.safetensors"

    def cost_keys(self, model: str, task: str) -> list[str]:
        """Hashes of what the cost of each of the pair's methods depends on."""
        return [self.cost_key(model, task, method) for method in self.pairs()[model, task]]

    def cost_key(self, model: str, task: str, method: str) -> str:
        """Hash of what the cost of a step depends on."""
        catalog = self.catalog
        entries = (catalog.models[model], catalog.tasks[task], catalog.methods[method])
        identity = [entry.identity() for entry in entries]
        identity.append(
            self.choice(Cell(model, task, method, "")).optimizer.model_dump(mode="json")
        )
        device = self.study.device
        return short_hash([FORMAT, COSTS, device, self.assets_of(model, task), *identity])

    def is_traced(self, model: str) -> bool:
        """Whether the cost of a model's steps is read off its configuration, without a device."""
        source = self.catalog.models[model].source
        return isinstance(source, ConfigSource | HubSource | FolderSource) and source.form in TRACED

    def trace_key(self, model: str, methods: Sequence[str]) -> str:
        """Hash of what traced costs of a model depend on."""
        entries = [self.catalog.models[model], *(self.catalog.methods[m] for m in methods)]
        return short_hash([COSTS, *(entry.identity() for entry in entries)])

    def sweep_key(self, name: str) -> str:
        """Hash of what a sweep of costs depends on."""
        assert self.study.costs is not None
        costs, sweep = self.study.costs, self.study.costs.sweeps[name]
        values = sweep.model_dump(mode="json", exclude={"label"})
        shape = [costs.batch, costs.seq]
        return short_hash(
            [values, shape, self.trace_key(sweep.model, sweep.methods or costs.methods)]
        )

    def claims_key(self) -> str:
        """Hash of the claims: a change judges them again, and runs nothing else."""
        return short_hash([claim.model_dump(mode="json") for claim in self.claims.values()])

    def texts_key(self) -> str:
        """Hash of what reports show and runs don't depend on."""
        unseen = {"optimizer", "optimizers"}
        texts = [
            [name, entry.model_dump(mode="json", include=entry.cosmetic - unseen)]
            for kind in ("methods", "models", "tasks", "budgets")
            for name, entry in getattr(self.catalog, kind).items()
        ]
        return short_hash([texts, self.study.description, self.study.scale])

    def choice(self, cell: Cell) -> Choice:
        """The optimiser of an experiment, and where it comes from. A choice that was made under
        other settings is used, and does not count as tuned. Without a budget: of the first that has
        been tuned."""
        found = self.tuned_at(cell)
        if found is None or found.choice is None:
            return Choice(
                self.catalog.methods[cell.method].optimizer, None, False, "catalog default"
            )
        tuning, tuned = self.study.tuning, not cell.budget or found.key == self.tuning_key(cell)
        source = "the study's own trials" if tuning.first else str(tuning.file)
        source += "" if tuned else ", made under other settings"
        return Choice(found.choice.optimizer, found.choice.eps, tuned, source)

    def trials(self, cell: Cell) -> tuple[Trial, ...]:
        """What was tried for an experiment; nothing where it has not been tuned."""
        found = self.tuned_at(cell)
        return () if found is None else found.trials

    def tuned_at(self, cell: Cell) -> Tuned | None:
        """The choice that has been made for an experiment, with its trials."""
        budgets = self.tuned.get(cell.model, {}).get(cell.task, {}).get(cell.method, {})
        return budgets.get(cell.budget) if cell.budget else next(iter(budgets.values()), None)

    def tuning_key(self, cell: Cell) -> str:
        """Hash of the settings that a choice is made under; a ceiling of memory changes how a
        gradient is computed, not which, so it isn't one of them."""
        catalog = self.catalog
        others = catalog.models[cell.model], catalog.tasks[cell.task]
        budget = catalog.budgets[cell.budget].scaled(1)
        return self.study.tuning.key(catalog.methods[cell.method], (*others, budget))

    def trials_key(self, cell: Cell) -> list[str]:
        """Hashes of all that an experiment's trials depend on."""
        root = self.study.tuning.roots(self.catalog.methods[cell.method])[0]
        return [self.tuning_key(cell), self.trial_spec(cell, root, 1.0).hash]

    def trials_file(self, cell: Cell) -> Path:
        """The manifest of an experiment's trials."""
        return self.results.joinpath("trials", *cell[:3], f"{cell.budget}.json")

    def first_trials(
        self, model: str, task: str, methods: str | None = None, budget: str | None = None
    ) -> list[Path]:
        """What a job waits for in a study that tunes first: trials of its pair, methods, budget."""
        return [
            self.trials_file(cell)
            for cell in (self.cells() if self.study.tuning.first else ())
            if cell[:2] == (model, task)
            and (methods is None or cell.method in methods.split("+"))
            and budget in (None, cell.budget)
        ]

    def spec(self, cell: Cell, seed: int) -> RunSpec:
        """The frozen spec of one seed of one experiment."""
        choice = self.choice(cell)
        return RunSpec(
            cell=tuple(cell),
            model=self.catalog.models[cell.model],
            task=self.catalog.tasks[cell.task],
            method=with_eps(self.catalog.methods[cell.method], choice.eps),
            budget=self.catalog.budgets[cell.budget],
            optimizer=choice.optimizer,
            evaluation=self.study.evaluation,
            seed=seed,
            assets=self.assets_of(cell.model, cell.task),
        )

    def seeds(self, cell: Cell) -> tuple[int, ...]:
        """The seeds of an experiment, of every block that names it; the study's if none does."""
        seeds = [
            seed
            for block in self.study.experiments
            if cell.model in block.models
            and cell.task in block.tasks
            and cell.method in block.methods
            and cell.budget in block.budgets
            for seed in block.seeds or self.study.seeds
        ]
        return tuple(dict.fromkeys(seeds)) or self.study.seeds

    @property
    def runs(self) -> int:
        """Number of runs: every seed of every experiment."""
        return sum(len(self.seeds(cell)) for cell in self.cells())

    def specs(self, cell: Cell) -> list[RunSpec]:
        return [self.spec(cell, seed) for seed in self.seeds(cell)]

    @staticmethod
    def cells_of(model: str, task: str, methods: str, budget: str) -> list[Cell]:
        """The experiments of a training job; ``methods`` are joined by ``+``."""
        return [Cell(model, task, method, budget) for method in methods.split("+")]

    def hashes(self, model: str, task: str, methods: str, budget: str) -> list[str]:
        """The runs of a training job."""
        cells = self.cells_of(model, task, methods, budget)
        return [spec.hash for cell in cells for spec in self.specs(cell)]

    def trial_spec(self, cell: Cell, setting: Setting, share: float) -> RunSpec:
        """A run of a setting at a share of the budget, scored on the validation split at its end."""
        return self.spec(cell, self.study.tuning.seed).model_copy(
            update={
                "cell": (*cell[:3], f"{cell.budget}.tune"),
                "method": with_eps(self.catalog.methods[cell.method], setting.eps),
                "budget": self.catalog.budgets[cell.budget].scaled(share),
                "optimizer": setting.optimizer,
                "evaluation": self.study.evaluation.model_copy(update={"points": (1.0,)}),
            }
        )
