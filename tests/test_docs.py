"""What the documentation shows runs as it stands there, and its tables say what the code does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save_file

from costbp.cli import app
from costbp.config import Cell, MethodEntry, load_plan
from costbp.data.pairs import Pair, check_pairs
from costbp.data.prepare import _packed, prepare
from costbp.data.splits import SPLITS
from costbp.errors import UserError
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from costbp.tasks import docstrings
from costbp.tasks.base import Example, load_task
from costbp.theory.variance import relative_error
from costbp.train.record import read_record
from tests.conftest import ROOT
from tests.small import reference

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(?:yaml|python)\n# (\S+)\n(.*?)^```$", re.M | re.S)
EXAMPLE = Path("my_methods/one_tensor.py")
STUDY = Path("config/studies/my_methods.yaml")


def blocks() -> list[tuple[Path, str]]:
    """The page's files: (path, content); a path that occurs again is added to."""
    return [
        (Path(path), text) for path, text in BLOCK.findall((DOCS / "add-a-method.md").read_text())
    ]


@pytest.fixture
def example(workdir):
    """A working copy in which the page's files have been written."""
    for path, text in blocks():
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as stream:
            stream.write("\n" + text)
    return workdir


def method(**changes) -> MethodEntry:
    """The example's entry, with other keys of its estimator."""
    entry = load_plan([STUDY]).catalog.methods["fmad_one_tensor"]
    return entry.model_copy(update={"estimator": entry.estimator.model_copy(update=changes)})


# --- adding a method ---------------------------------------------------------------------------


def test_a_method_of_ones_own_takes_fewer_than_30_lines():
    code = dict(blocks())[EXAMPLE]
    assert 10 < len(code.splitlines()) + 1 < 30  # with the line that names the file


def prepared(plan, width=64):
    """Random features where a run looks for prepared ones: reading and encoding takes seconds."""
    path = plan.prepared("tiny_head", "docstrings")
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    tensors, names = {}, list(docstrings.TASK.names)
    for name in SPLITS:
        tensors[f"{name}.values"] = torch.randn(64, width)
        labels = torch.randint(0, 4, (64,))
        tensors[f"{name}.labels"] = labels
        tensors[f"{name}.examples"] = _packed([Example("", names[i]) for i in labels])
    facts = {"names": names, "majority": dict.fromkeys(SPLITS, 0.25)}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})


def test_the_page_is_valid_and_its_methods_train(example, costbp):
    done = costbp("validate", "-c", str(STUDY))
    assert done.returncode == 0, done.stderr
    assert "4 experiments, 8 runs, valid" in done.stdout
    plan = load_plan([STUDY])
    prepared(plan)
    for name, steps in (("fmad_one_tensor", 1333), ("fmad_orthogonal_32", 111)):
        cell = Cell("tiny_head", "docstrings", name, "units_4k")
        words = [f"--{key}={value}" for key, value in cell._asdict().items()]
        app(["train", "-c", str(STUDY), *words, "--seed", "0"], standalone_mode=False)
        record = read_record(plan.spec(cell, 0).folder(plan.study.paths.store))
        assert record.outcome == "completed"
        assert record.summary.steps == steps
        units = plan.catalog.methods[name].closed_form()
        assert record.summary.forward_units == units * steps


@pytest.mark.parametrize("count", [1, 2])
def test_the_example_is_unbiased_with_the_stated_error(example, count):
    torch.manual_seed(0)
    objective = Objective(Head(3, 4).double(), cross_entropy)
    data = {"features": torch.randn(5, 3).double(), "labels": torch.tensor([0, 1, 2, 3, 0])}
    _, gradient = reference(objective, data)
    square, tensors = float(gradient @ gradient), list(objective.slices.values())
    parts = [(b - a, float(gradient[a:b] @ gradient[a:b])) for a, b, _ in tensors]
    if count == 1:  # S = T sum_j (d_j + 2) |g_j|^2 / |g|^2, since each tensor has its turn 1 in T
        second = len(parts) * sum((size + 2) * own for size, own in parts) / square
        expected = relative_error(second, 1) * square
    else:  # each tensor once
        expected = sum((size + 1) * own for size, own in parts)
    estimator, keys = method(options={"count": count}).build(), 400
    rows = torch.stack(
        [
            estimator.estimate(objective, [data], Key(seed, 3)).gradient.clone()
            for seed in range(keys)
        ]
    )
    errors = (rows - gradient).square().sum(1)
    assert abs(float(errors.mean()) - expected) < 5 * float(errors.std()) / math.sqrt(keys)
    # |mean - g|^2 is expected / keys on average, with about d degrees of freedom
    assert float((rows.mean(0) - gradient).square().sum()) < 3 * expected / keys
    assert 12 * expected / keys < square  # so that half or twice g would not pass


def test_a_changed_file_is_another_run(example):
    def hashes():
        plan = load_plan([STUDY])
        return {cell.method: plan.spec(cell, 0).hash for cell in plan.cells()}

    before, text = hashes(), EXAMPLE.read_text()
    EXAMPLE.write_text(text + "# another line\n")
    changed = {name for name, value in hashes().items() if value != before[name]}
    assert changed == {"fmad_one_tensor"}
    EXAMPLE.write_text(text)
    assert hashes() == before


def test_a_missing_file_is_one_line(example, costbp):
    EXAMPLE.unlink()
    done = costbp("validate", "-c", str(STUDY))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"fmad_one_tensor.estimator.file = '{EXAMPLE}': there is no file" in line


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("bild", "has no function 'bild'"),
        ("list", "list() must return a costbp.estimators.Estimator, not list"),
    ],
)
def test_a_function_that_builds_no_estimator_is_one_line(example, function, words):
    with EXAMPLE.open("a") as stream:
        stream.write("\nfrom builtins import list\n")
    with pytest.raises(UserError, match=re.escape(f"{EXAMPLE}: {words}")) as caught:
        method(function=function, options={}).build()
    assert "\n" not in str(caught.value)


# --- adding a model and a task -----------------------------------------------------------------

BAG, SMS = Path("my_models/word_bag.py"), Path("my_tasks/sms_spam.py")
OWN = Path("config/studies/own.yaml")


@pytest.fixture
def own(workdir):
    """A working copy with the page's model, task and their entries, and a study of them."""
    page = re.sub(r"^   ", "", (DOCS / "add-an-entry.md").read_text(), flags=re.M)
    for path, text in dict(BLOCK.findall(page)).items():  # of a catalog's file the last entry
        Path(path).parent.mkdir(exist_ok=True)
        if path in (str(BAG), str(SMS), "config/catalog/models.yaml", "config/catalog/tasks.yaml"):
            with Path(path).open("a") as stream:
                stream.write("\n" + text)
    folder = Path("cache/assets/nlp_data")
    folder.mkdir(parents=True)
    rows = [f"{i % 2},{('see you', 'WIN now')[i % 2]}  at {i}" for i in range(60)]
    (folder / "sms_spam.csv").write_text("\n".join(["spam,text", *rows]))
    block = {"models": ["word_bag"], "tasks": ["sms_spam"], "methods": ["bp_vanilla", "bp_checkpointing"], "budgets": ["five"]}  # fmt: skip
    entries = {
        "tasks": {"sms_spam": {"validation": 8, "test": 8, "batch_size": 4}},
        "methods": {"bp_vanilla": {"optimizer": {"lr": 0.1}}},
        "budgets": {"five": {"label": "five", "steps": 5}},
    }
    OWN.write_text(json.dumps({"study": "own", "experiments": [block], "entries": entries}))
    return workdir


def own_spec():
    plan = load_plan([OWN])
    return plan, plan.spec(next(plan.cells()), 0)


def test_a_model_and_a_task_of_ones_own_train(own):
    app(["train", "-c", str(OWN), *(f"--{k}={v}" for k, v in zip(
        ("model", "task", "method", "budget"), ("word_bag", "sms_spam", "bp_vanilla", "five"),
        strict=True)), "--seed", "0"], standalone_mode=False)  # fmt: skip
    plan, spec = own_spec()
    record = read_record(spec.folder(plan.study.paths.store))
    assert record.outcome == "completed"
    assert record.summary.d == 512 * 32 + 2 * 32 + 2
    assert record.summary.test_accuracy == 1  # "win" is spam
    assert load_task(spec.task.loader).names == ("ham", "spam")


def test_changed_files_of_a_model_and_a_task_are_other_runs(own):
    plan, spec = own_spec()
    seen = {spec.hash}
    prepared = plan.prepared("word_bag", "sms_spam")
    for file, again in ((BAG, False), (SMS, True)):
        file.write_text(file.read_text() + "# another line\n")
        plan, other = own_spec()
        seen.add(other.hash)
        assert (plan.prepared("word_bag", "sms_spam") != prepared) is again
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("kind", "entry", "change", "words"),
    [
        ("models", "source: {function: bild}", "", f"{BAG}: has no function 'bild'"),
        ("models", "source: {options: {heads: 3}}", "", f"{BAG}: build() got an unexpected keyword"),
        ("models", "", "build = lambda **_: 3", "build() must return a torch.nn.modules.Module, not int"),
        ("models", "", "build = lambda **_: nn.ReLU()", "returns a module with nothing to train"),
        ("models", "source: {assets: [minilm]}", "", "model asset 'minilm' is not in"),
        ("models", "source: {images: true}", "", "model 'word_bag' needs images, and task"),
        ("models", "source: {file: none.py}", "", "source.file = 'none.py': there is no file"),
        ("models", "source: {basis: 3}", "", "unknown key 'models.word_bag.source.basis'"),
        ("tasks", "loader: none.py", "", "sms_spam.loader.file = 'none.py': there is no file none.py"),
        ("tasks", "loader: {kind: python, fil: x}", "", "unknown key 'tasks.sms_spam.loader.fil'"),
        ("tasks", "loader: sms_spam", "", "loader = 'sms_spam' is not a module of costbp/tasks"),
        ("tasks", "", "TASK = 3", f"{SMS}: has no function 'TASK'"),
        ("tasks", "", "def (", f"{SMS}: can't be run (SyntaxError: "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_ones_own_files_is_one_line(own, kind, entry, change, words):
    name, file = {"models": ("word_bag", BAG), "tasks": ("sms_spam", SMS)}[kind]
    if kind == "models" and "kind" not in entry and "source" in entry:
        entry = entry.replace("{", "{kind: python, ", 1)
    over = Path("over.yaml")
    over.write_text(f"entries: {{{kind}: {{{name}: {{{entry}}}}}}}")
    file.write_text(f"{file.read_text()}\n{change}\n")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        plan = check_pairs(load_plan([OWN, over]))
        build_model(plan.catalog.models["word_bag"], 2, Path("cache/assets"), 0, 0)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_tasks_file_names_the_row(own):
    SMS.write_text(SMS.read_text().replace('row["text"]', 'row["txt"]'))
    plan = load_plan([OWN])
    with pytest.raises(UserError, match=r"task 'sms_spam': row 1: KeyError 'txt'") as caught:
        prepare(Pair.of(plan, "word_bag", "sms_spam"))
    assert "\n" not in str(caught.value)


# --- tables ------------------------------------------------------------------------------------


def test_tables_of_keys_and_methods_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import tables

    pages = tables.pages()
    assert len(pages) == 2
    for page, text in pages.items():
        assert page.read_text() == text, f"{page.name}: run `python docs/tables.py`"
        assert "| --- |" in text and "<!-- end -->" in text


def test_every_class_of_the_catalog_is_documented(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import tables

    shown = set(re.findall(r"<!-- table: (\w+) -->", (DOCS / "config.md").read_text()))
    hidden = {"Strict", "Drawn", "Mapped", "Repository", "PythonFile", "Plan", "RunSpec", "Catalog"}
    hidden |= {
        "HeadTraining",
        "FullTraining",
        "NormTraining",
        "Setting",
    }  # without keys of their own
    assert set(tables.config_classes()) - hidden - shown == set()


# --- links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
