"""The search for rates: equal totals, edges, decisions that noise can't make; resumed, and first of all."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path

import pytest
import yaml

from costbp.cli.app import load
from costbp.config import Cell, MethodEntry, OptimizerSpec, load_plan
from costbp.config.catalog import BudgetEntry
from costbp.config.load import settled
from costbp.config.tuning import Trial, Tuning, searches_eps, with_eps
from costbp.cost.outlook import outlook_lines
from costbp.errors import UserError
from costbp.train.experiment import _Session, run_specs
from costbp.train.tune import Search, ranked, run_trials, write_choices, write_manifest
from tests.test_runs import SMOKE, plan, prepared  # noqa: F401
from tests.test_workflow import snakemake

RANK = partial(ranked, majority=0.25, examples=400)
METHODS = ["bp_vanilla", "fmad_multiple", "zo_vanilla", "fzoo", "zo_sign", "zo_adam", "hizoo"]


def peak(best: float, name: str | None = None):
    """A loss that is least at one rate, and accuracies to it."""

    def score(setting, share):
        away = abs(math.log10(setting.lr / best)) + (setting.name not in (name, None))
        return {"accuracy": 0.9 - 0.1 * min(away, 8), "loss": away}

    return score


def searched(method: MethodEntry, score, rank=RANK, **tuning) -> Search:
    """A search told what ``score`` makes of each setting."""
    search = Search(Tuning(file="none.yaml", **tuning), method, rank)
    for setting, share in search.asks():
        given = setting.model_dump() | {"share": share} | score(setting, share)
        search.trials.append(Trial(**given))
    return search


@pytest.fixture(scope="module")
def methods():
    return load_plan().catalog.methods


# --- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("best", [3e-3, 1e-9, 1e9])
@pytest.mark.parametrize("total", [4, 5])
def test_every_method_spends_the_same(methods, name, best, total):
    search = searched(methods[name], peak(best), total=total)
    shares = [trial.share for trial in search.trials]
    assert sum(shares) == total
    assert shares == sorted(shares) and len(shares) == search.tuning.trials
    for number in range(total):  # a round costs one budget, and each has half as many
        assert shares.count(0.5 ** (total - number)) == 2 ** (total - number)
    first = [t.compact() for t in search.trials[: 2**total]]
    assert len({str(sorted(t.items())) for t in first}) == len(first)  # nothing is tried twice


@pytest.mark.parametrize("name", METHODS)
def test_rates_are_the_same_for_all_and_steps_only_where_there_are_differences(methods, name):
    method, tuning = methods[name], Tuning(file="none.yaml")
    roots = tuning.roots(method)
    allowed = {"fzoo": ["sgd"], "zo_sign": ["sgd"], "zo_adam": ["adamw"]}.get(
        name, ["adamw", "sgd"]
    )
    assert [(r.name, r.lr) for r in roots] == [(n, lr) for n in allowed for lr in tuning.rates[n]]
    found = {trial.eps for trial in searched(method, peak(3e-3)).trials}
    assert found == ({None, 1e-2, 1e-1} if name[:2] in ("zo", "fz", "hi") else {None})
    assert searches_eps(method) is (len(found) > 1)


def test_a_step_of_differences_is_the_methods_own_afterwards(methods):
    assert with_eps(methods["zo_vanilla"], 0.1).estimator.oracle.eps == 0.1
    assert with_eps(methods["hizoo"], 0.1).estimator.eps == 0.1
    assert not searches_eps(
        with_eps(methods["fzoo"], 0.1)
    )  # an entry that fixes it is not searched


@pytest.mark.parametrize("name", METHODS)
def test_the_best_rate_is_found_to_a_quarter_decade(methods, name):
    kind = methods[name].optimizers[-1]
    choice = searched(methods[name], peak(4e-3, kind)).tuned("k").choice
    assert choice.name == kind and abs(math.log10(choice.lr / 4e-3)) < 0.25


@pytest.mark.parametrize(("best", "rate"), [(1e2, 1e2), (1e-6, 1e-6), (1e9, 1e2)])
def test_a_best_rate_at_the_edge_extends_the_range(methods, best, rate):
    tuned = searched(methods["fzoo"], peak(best)).tuned("k")
    assert tuned.choice.lr == pytest.approx(rate)
    assert f"range extended to sgd {rate:g}" in tuned.note and "stands at the edge" in tuned.note
    without = searched(methods["fzoo"], peak(best), beyond=0).tuned("k")
    assert without.choice.lr in (1e-4, 1.0) and "extended" not in without.note


def test_an_edge_that_shows_late_is_followed_within_the_total(methods):
    def score(setting, share):  # longer trials want lower rates
        return peak(1e-2 if share < 0.1 else 1e-8)(setting, share)

    search = searched(methods["zo_sign"], score)
    assert sum(trial.share for trial in search.trials) == 4
    went_on = [t.lr for t in search.trials if t.share == 1 / 8]
    assert search.tuned("k").choice.lr <= 1e-3 < min(went_on)
    within = searched(methods["bp_vanilla"], peak(3e-3, "sgd"))
    assert within.tuned("k").choice.lr == 3.16e-3 and not within.notes


def test_steps_that_make_no_difference_keep_no_rate_from_going_on(methods):
    search = searched(methods["zo_vanilla"], peak(3e-3))
    for share in (1 / 8, 1 / 4, 1 / 2):
        rates = [(trial.name, trial.lr) for trial in search.trials if trial.share == share]
        assert len(set(rates)) == len(rates)
    search = searched(
        methods["zo_vanilla"], lambda s, _: {"accuracy": 0.5, "loss": abs(s.eps or 1)}
    )
    assert search.tuned("k").choice.eps == 0.01  # but where they do, the best goes on


# --- the decision ----------------------------------------------------------------------------------


def trial(lr: float, accuracy: float | None, loss: float | None, outcome="completed") -> Trial:
    return Trial(name="sgd", lr=lr, share=0.5, accuracy=accuracy, loss=loss, outcome=outcome)


def test_one_example_of_the_validation_split_decides_nothing():
    near = [trial(1, 0.7025, 0.9), trial(2, 0.7, 0.8), trial(3, 0.64, 0.7)]
    assert [t.lr for t in RANK(near)] == [2, 1, 3]  # 0.0025 is one of 400, 0.06 more than an error
    chance = [trial(1, 0.285, 1.4), trial(2, 0.25, 1.3), trial(3, 0.2, 1.2)]
    assert [t.lr for t in RANK(chance)] == [3, 2, 1]
    left = [trial(1, 0.30, 1.4), trial(2, 0.25, 1.3)]  # 0.25 + 2 x 0.0217 < 0.30
    assert [t.lr for t in RANK(left)] == [1, 2]


@pytest.mark.parametrize(("limit", "share"), [({"forward_units": 96}, 6.0), ({"steps": 5}, 1)])
def test_a_trial_has_its_share_of_the_budget_and_no_ceiling(limit, share):
    """A ceiling changes how an estimate is computed and not what it is: rates hold under any."""
    trial = BudgetEntry(label="b", peak_memory={"inference": 1.5}, **limit).scaled(1 / 16)
    assert trial.peak_memory is None and trial.amount == share


def test_what_did_not_complete_loses_to_all():
    worst = trial(1, 0.0, None)
    found = RANK([trial(3, 0.9, 0.1, "diverged"), trial(2, None, None, "out_of_memory"), worst])
    assert [t.lr for t in found] == [1, 2, 3]


def test_a_search_without_a_completed_trial_chooses_nothing(methods):
    search = searched(methods["zo_vanilla"], lambda *_: {"outcome": "diverged"})
    assert search.tuned("k").choice is None and sum(t.share for t in search.trials) == 4
    assert {t.lr for t in search.trials} >= {1e-6, 1e-7}  # where all diverge, rates go down


def test_noise_at_chance_does_not_choose_a_rate_that_makes_loss_worse(methods):
    """Accuracy is the majority class's and noise, loss tells: the choice is that of the loss."""
    draw = random.Random(0)

    def score(setting, share):
        accuracy = 0.25 + draw.uniform(-1, 1) * 0.04
        return {"accuracy": accuracy, "loss": peak(1e-3, "sgd")(setting, share)["loss"]}

    choice = searched(methods["zo_vanilla"], score).tuned("k").choice
    assert choice.optimizer == OptimizerSpec(name="sgd", lr=1e-3)


# --- in a study ------------------------------------------------------------------------------------

CELL = Cell("tiny_head", "docstrings", "zo_vanilla", "units_400")
SMALL = {"total": 2, "rates": {"sgd": [1e-3, 1e-1], "adamw": [1e-3, 1e-1]}, "seed": 7}


def with_tuning(plan, **changes):  # noqa: F811
    tuning = Tuning.model_validate({"file": "tuned.yaml", **SMALL, **changes})
    block = plan.study.experiments[0].model_copy(
        update={name: (value,) for name, value in zip(
            ("models", "tasks", "methods", "budgets"), CELL, strict=True)}
    )  # fmt: skip
    update = {"tuning": tuning, "experiments": (block,)}
    return plan.model_copy(update={"study": plan.study.model_copy(update=update)})


@pytest.fixture
def small(plan):  # noqa: F811
    return with_tuning(plan)


def test_trials_run_once_are_written_and_chosen(small, monkeypatch):
    ran: list[str] = []
    plain = _Session.run

    def counted(self, spec, *rest, **options):
        if len(ran) == 4 and len(set(ran)) == 4 and not ran.count("stopped"):
            ran.append("stopped")
            raise KeyboardInterrupt
        assert options["test"] is False and spec.seed == 7
        ran.append(spec.hash)
        return plain(self, spec, *rest, **options)

    monkeypatch.setattr(_Session, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        run_trials(small, CELL)
    tuned = run_trials(small, CELL)
    assert run_trials(small, CELL) == tuned
    hashes = [hash for hash in ran if hash != "stopped"]
    assert len(hashes) == len(set(hashes)) == len(tuned.trials) == 6
    units = [
        record.summary.forward_units
        for record in run_specs(
            small, (small.trial_spec(CELL, t.but(), t.share) for t in tuned.trials), test=False
        )
    ]
    assert all(0 <= 400 * t.share - spent < 2 for t, spent in zip(tuned.trials, units, strict=True))

    with pytest.raises(UserError, match="has not been tuned"):
        write_choices(small, Path("tuned.yaml"))
    write_manifest(small, CELL, tuned, None)
    write_choices(small, Path("tuned.yaml"))
    text = Path("tuned.yaml").read_text()
    assert len([line for line in text.splitlines() if "share:" in line]) == 6
    read = load_plan([SMOKE, over(small)])
    assert read.trials(CELL) == tuned.trials
    choice = read.choice(CELL)
    assert choice == (tuned.choice.optimizer, tuned.choice.eps, True, "tuned.yaml")
    spec = read.spec(CELL, 0)
    assert spec.optimizer == choice.optimizer
    assert spec.method.estimator.oracle.eps == choice.eps
    assert read.choice(CELL._replace(budget="")).optimizer == choice.optimizer


def over(plan, **changes) -> Path:  # noqa: F811
    block = {key: list(value) for key, value in plan.study.experiments[0] if value}
    block["methods"] = ["bp_checkpointing", "zo_vanilla"]
    path = Path("over.yaml")
    tuning = {"file": "tuned.yaml", **SMALL, **changes}
    path.write_text(yaml.safe_dump({"experiments": [block], "tuning": tuning}))
    return path


@pytest.mark.parametrize("changes", [{"total": 3}, {"seed": 8}, {"eps": [1.0]}, {"beyond": 0}])
def test_a_choice_made_under_other_settings_is_used_and_not_tuned(small, changes):
    run = run_trials(small, CELL)
    write_manifest(small, CELL, run, None)
    write_choices(small, Path("tuned.yaml"))
    plan = load_plan([SMOKE, over(small, **changes)])  # noqa: F811
    choice = plan.choice(CELL)
    assert choice.optimizer == run.choice.optimizer and not choice.tuned
    assert choice.source == "tuned.yaml, made under other settings"
    (warning,) = outlook_lines(plan)
    assert warning.startswith("warning: 1 of 2 choices in tuned.yaml")
    assert plan.choice(CELL._replace(method="bp_checkpointing")).source == "catalog default"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "tuning.seed = 1 is one of the study's seeds"),
        ({"total": 1}, "makes 2 trials in the first round, and bp_checkpointing has 4 rates"),
        ({"rates": {"sgd": [1.0, 0.1]}}, "rates of sgd must rise"),
        ({"rates": {"rmsprop": [0.1, 1.0]}}, "unknown key 'rmsprop'"),
        ({"fraction": 0.5}, "unknown key 'tuning.fraction'"),
        ({"first": True, "total": 8}, "a trial of bp_checkpointing gets 1.5625 forward units"),
    ],
)
def test_mistakes_are_one_line(small, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        load_plan([SMOKE, over(small, **changes)])
    assert str(caught.value).startswith("over.yaml: ") and "\n" not in str(caught.value)


def test_what_tuning_takes_is_said_beforehand(workdir):
    plan = load_plan([Path("config/studies/workstation.yaml")])  # noqa: F811
    training, tuning = outlook_lines(plan, tunes=True)
    assert training.startswith("study 'workstation'")
    assert "1,350 trials of 45 experiments, at most 720,000 forward units" in tuning
    assert "GPU hours" in tuning and len(outlook_lines(plan)) == 1


def test_a_study_that_tunes_first_is_tuned_and_settles(small):
    study = "tuned_first"
    overlay = over(small, first=True)
    overlay.write_text(overlay.read_text() + f"study: {study}\nseeds: [0]\n")
    words = [f"results/{study}/runs.parquet", "--configfile", str(SMOKE), str(overlay)]
    here = Path.cwd()
    done = snakemake(here, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 trials of 2 experiments, at most 1,600 forward units" in done.stderr
    plan = load([SMOKE, overlay], None)  # noqa: F811
    assert plan == settled(plan)
    for cell in plan.cells():
        assert plan.choice(cell).tuned and len(plan.trials(cell)) == 6
        assert plan.spec(cell, 0).folder(plan.study.paths.store).joinpath("record.json").exists()
    again = snakemake(here, *words)
    assert "Nothing to be done" in again.stdout + again.stderr
    changed = overlay.read_text().replace("seed: 7", "seed: 8")
    overlay.write_text(changed)
    planned = snakemake(here, "-n", *words).stdout
    assert {"trials", "train_head", "cost"} <= set(planned.split()) and "prepare  " not in planned
