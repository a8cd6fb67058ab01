"""Names of entries, paths and labels: what reaches a shell, a file system, a figure or a page does so as it
is, or is refused at the start."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from costbp.analysis.panels import by_factors, grid, save
from costbp.analysis.tables import latex, markdown
from costbp.config import load_plan
from costbp.config.study import Plan
from costbp.errors import UserError
from tests.conftest import working_copy
from tests.small_studies import SHIPPED, snakemake

BAD = ("$(touch X)", "a b", "a#b", "../esc", "a/b", "-rf", ".a", "a.", "", "a" * 65, "\u00fcn\u00ef", "{x}", "a+b", "a,b", "a\nb")  # fmt: skip
GOOD = ("a", "_", "A-1.b_2", "a" * 64, "1e5x", "bp--x..y")
KINDS = {  # file -> way to a mapping whose keys are names
    "catalog/methods.yaml": (),
    "catalog/models.yaml": (),
    "catalog/tasks.yaml": (),
    "catalog/budgets.yaml": (),
    "catalog/assets.yaml": (),
    "catalog/groups.yaml": ("methods",),
    "claims.yaml": (),
    "config.yaml": ("insight", "problems"),
    "studies/full_size.yaml": ("costs", "sweeps"),
}


def named(file: str, name: str) -> None:
    """Give the first entry of a file another entry's twin, of this name."""
    path = Path("config", file)
    data = yaml.safe_load(path.read_text())
    inner = data
    for key in KINDS[file]:
        inner = inner[key]
    inner[name] = next(iter(inner.values()))
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


@pytest.mark.parametrize("file", KINDS)
def test_what_can_be_no_name(workdir, file):
    overlays = [Path("config/studies/full_size.yaml")] if "full_size" in file else []
    text = Path("config", file).read_text()
    for name in BAD if file == "catalog/methods.yaml" else BAD[:4]:
        named(file, name)
        with pytest.raises(UserError, match="can't be a name") as caught:
            load_plan(overlays)
        assert Path(file).name in str(caught.value) and repr(name)[:60] in str(caught.value)
        Path("config", file).write_text(text)


def test_what_can_be_a_name(workdir):
    text = Path("config/catalog/methods.yaml").read_text()
    for name in GOOD:
        named("catalog/methods.yaml", name)
        assert name in load_plan().catalog.methods
        Path("config/catalog/methods.yaml").write_text(text)


@pytest.mark.parametrize("study", ["$(touch X)", "../esc", "-x", "a b"])
def test_a_studys_name(workdir, study):
    Path("own.yaml").write_text(yaml.safe_dump({"study": study}))
    with pytest.raises(UserError, match=r"own.yaml: study: .* can't be a name"):
        load_plan([Path("own.yaml")])


def test_a_studys_own_entries(workdir):
    entry = {"label": "x", "steps": 1}
    Path("own.yaml").write_text(yaml.safe_dump({"entries": {"budgets": {"$(touch X)": entry}}}))
    with pytest.raises(UserError, match=r"own.yaml: budgets: .* can't be a name"):
        load_plan([Path("own.yaml")])


@pytest.mark.parametrize("repo", [{"repo": "$(touch X)/y"}, {"repo": "x/y", "revision": "a/../b"}])
def test_a_repositorys_folder(workdir, repo):
    base = {"label": "x", "train": {"kind": "head"}, "source": {"kind": "hub", **repo}}
    Path("own.yaml").write_text(yaml.safe_dump({"entries": {"models": {"own": base}}}))
    with pytest.raises(UserError, match=r"own.yaml: models.own.source.re.*: string should match"):
        load_plan([Path("own.yaml")])


def test_jobs_of_long_names_have_files_of_their_own(plan: Plan):
    methods = [f"{i}{'x' * 60}" for i in range(8)]
    entry = plan.catalog.methods["zo_vanilla"]
    catalog = plan.catalog.model_copy(
        update={"methods": plan.catalog.methods | dict.fromkeys(methods, entry)}
    )
    block = plan.study.experiments[0].model_copy(update={"methods": tuple(methods)})
    resources = plan.study.resources.model_copy(update={"methods_per_job": 8})
    study = plan.study.model_copy(update={"experiments": (block,), "resources": resources})
    jobs = [
        names for *_, names in plan.model_copy(update={"catalog": catalog, "study": study}).jobs()
    ]
    assert sorted(name for names in jobs for name in names) == methods
    assert max(len("+".join(names)) for names in jobs) <= 200


# --- paths -----------------------------------------------------------------------------------------

PATHS = {
    "store": "the runs $(touch PLANTED) 'n' #1",
    "cache": "ca che `touch PLANTED` %20",
    "results": "res ults; touch PLANTED; $HOME",
    "reports": 're ports & "more" \u00fc*?',
    "mlflow": "ml flow",
}


def test_odd_paths_reach_every_command_whole(tmp_path, monkeypatch):
    folder = working_copy(tmp_path / "it's a $(touch PLANTED) {x} folder #1")
    monkeypatch.chdir(folder)
    own = {
        "study": "odd.one-2",
        "paths": PATHS,
        "tuning": {"file": "tu ned/$(touch PLANTED) {x}'s.yaml"},
    }
    Path("own study.yaml").write_text(yaml.safe_dump(own))
    files = ["--configfile", str(SHIPPED["smoke"]), "own study.yaml"]
    said = snakemake("-n", "-p", "all", "tune", "costs", *files)
    commands = [
        shlex.split(line) for line in re.findall(r"^Shell command: .*?(costbp .*)$", said, re.M)
    ]
    plan = f"{PATHS['results']}/odd.one-2/plan.json"
    assert len(commands) > 20
    for words in commands:
        assert words[words.index("--plan") + 1] == plan
    assert {words[1] for words in commands} >= {
        "prepare",
        "train",
        "cost",
        "trials",
        "tune",
        "sweep",
        "fit",
    }
    assert sum(words[1] == "trials" for words in commands) == 5  # of every experiment
    assert any("tu ned/$(touch PLANTED) {x}'s.yaml" in word for words in commands for word in words)
    made = Path(PATHS["results"], "odd.one-2/prepared/tiny_head/docstrings.json")
    snakemake(str(made), *files)
    log = Path("logs/odd.one-2/prepare/tiny_head/docstrings.log")
    assert made.is_file() and log.is_file() and log.with_suffix(".benchmark.jsonl").is_file()
    assert not list(tmp_path.rglob("PLANTED"))


@pytest.mark.parametrize("path", ["{x}", "a{", "<x>", "a\nb"])
def test_paths_that_snakemake_would_read_as_names(workdir, path):
    Path("own.yaml").write_text(yaml.safe_dump({"paths": {"results": path}}))
    with pytest.raises(UserError, match=r"own.yaml: paths.results.*braces"):
        load_plan([Path("own.yaml")])


# --- labels ----------------------------------------------------------------------------------------

LABELS = ("$\\frac", "a $ b", "$x_{$ ^_{}", "<script>alert(1)</script>", "_hidden", "100 % & #1")


def test_figures_draw_labels_as_they_are(tmp_path):
    def draw(axis, place):
        axis.plot([1, 1000], [1e-3, 1e3], label="line")
        by_factors(axis.xaxis)
        by_factors(axis.yaxis, of=10)

    save(grid(LABELS, draw, x=LABELS[0], y=LABELS[2]), tmp_path / "figure")
    drawn = re.sub(r"<!--.*?-->", "", (tmp_path / "figure.svg").read_text(), flags=re.S)
    for label in LABELS:
        assert label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in drawn
    assert "mathdefault" not in drawn
    plt.close("all")


def test_tables_hold_labels_as_they_are():
    table = pd.DataFrame({"Method": ["a|b\nc", "$x_1$"], "B": ["\\x", "~^"], "C": ["%", "{}"]})
    rows = markdown(table).splitlines()
    assert len(rows) == 4 and rows[2] == "| a\\|b c | \\x | % |"
    text = latex(table, "50 % of $x_{1} ~ \\y")
    assert r"\caption{50 \% of \$x\_\{1\} \textasciitilde{} \textbackslash{}y}" in text
