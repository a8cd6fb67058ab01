"""A mistake names file, key, value and what is allowed, before anything is computed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from costbp.cli import app
from costbp.config import Cell, load_plan
from costbp.config.catalog import Catalog
from costbp.config.schemas import schemas
from costbp.errors import UserError
from tests.conftest import ROOT


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CEILINGS = {  # what stands there -> words of the refusal
    "0": ["is 0, and wants a size, as 96MB", "1 or more"],
    "0MB": ["= '0MB'", "a number with a unit", "above 0"],
    "96XB": ["= '96XB'", "a number with a unit, as 24GB"],
    "'96'": ["= '96'", "with a unit"],
    "{inference: 0.9}": ["is {'inference': 0.9}, and wants", "1 or more"],
    "{inference: .inf}": [".inference, line", "'.inf' is no finite number"],
    "{inferense: 2}": ["is {'inferense': 2}, and wants", "{inference: 1.5}"],
    "[96MB]": ["is ['96MB'], and wants"],
}


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("config.yaml", "[bp_checkpointing, fmad_vanilla, fmad_multiple", "[bp_checkpoint, fmad_vanilla, fmad_multiple", ["methods[0]", "'bp_checkpoint'", "did you mean 'bp_checkpointing'"]),
        ("config.yaml", "[minilm_block]", "[minilm_blok]", ["models[0]", "did you mean 'minilm_block'"]),
        ("config.yaml", "[movie_reviews]", "[movie_review]", ["tasks[0]", "did you mean 'movie_reviews'"]),
        ("config.yaml", "[units_8k]", "[units_80k]", ["budgets[0]", "allowed: units_"]),
        ("config.yaml", "seeds:", "sedes:", ["unknown key 'sedes'", "did you mean 'seeds'"]),
        ("config.yaml", "seeds: [0, 1, 2, 3, 4]", "seeds: []", ["seeds"]),
        ("config.yaml", "diverged_at: 10", "diverged_at: ten", ["evaluation.diverged_at", "'ten'"]),
        ("config.yaml", "device: auto", "device: gpu", ["device", "'gpu'", "allowed: auto, cpu, cuda"]),
        ("config.yaml", "0.8, 1]", "1, 0.8]", ["evaluation.points", "must rise"]),
        ("config.yaml", "study: laptop", "study: [laptop", ["line", "not valid YAML"]),
        ("catalog/budgets.yaml", "forward_units: 400", "forward_units: 0", ["units_400", "= 0", "greater than 0"]),
        ("catalog/budgets.yaml", "forward_units: 400", "forward_units: 400\n  steps: 3", ["exactly one of"]),
        *((
            "catalog/budgets.yaml",
            "forward_units: 400",
            f"forward_units: 400\n  peak_memory: {given}",
            ["units_400.peak_memory", *words],
        ) for given, words in CEILINGS.items()),
        ("catalog/methods.yaml", "plan: per_block", "plan: per_blok", ["'per_blok'", "did you mean 'per_block'"]),
        ("catalog/methods.yaml", "count: 8", "count: 0", ["directions.count", "= 0"]),
        ("catalog/methods.yaml", "{kind: central}", "{kind: central, eps: 0}", ["oracle", "eps", "greater than 0"]),
        ("catalog/methods.yaml", "kind: exact", "kind: exakt", ["'exakt'", "did you mean 'exact'"]),
        ("catalog/methods.yaml", "kind: rademacher", "kind: rademacker", ["'rademacker'", "did you mean 'rademacher'"]),
        ("catalog/methods.yaml", "fraction: 0.01", "fraction: 1.5", ["fraction", "1.5", "less than or equal to 1"]),
        ("catalog/methods.yaml", "fraction: 0.01", "fraction: 0", ["fraction", "greater than 0"]),
        ("catalog/methods.yaml", "period: 25", "period: 0", ["svrg.period", "= 0"]),
        ("catalog/methods.yaml", "plan: per_block", "plan: byte_budget", ["mebibytes"]),
        ("catalog/methods.yaml", "plan: per_block", "plan: per_block, inputs: 8", ["'inputs' goes with plan 'sub_layer' only"]),
        ("catalog/methods.yaml", "plan: per_block", "plan: per_block, mebibytes: 8", ["mebibytes"]),
        ("catalog/methods.yaml", "oracle: *exact\n    directions: &eight", "oracle: *exact\n    scale: legacy\n    directions: &eight", ["'legacy'", "'exact'"]),
        ("catalog/methods.yaml", "kind: rademacher, count: 8", "kind: rademacher, count: 1", ["'spread'", "count >= 2"]),
        ("catalog/methods.yaml", "candidates: 2", "candidats: 2", ["did you mean 'candidates'"]),
        ("catalog/models.yaml", "asset: minilm}", "asset: minilmm}", ["'minilmm'", "did you mean 'minilm'"]),
        ("catalog/tasks.yaml", "loader: trec", "loader: trek", ["'trek'", "did you mean 'trec'"]),
        ("catalog/tasks.yaml", "batch_size: 8", "batchsize: 8", ["did you mean 'batch_size'"]),
        ("config.yaml", "[study]", "[studi]", ["experiments[5].methods[0] = 'studi'", "did you mean 'study'"]),
        ("catalog/groups.yaml", "- bp_vanilla", "- bp_vanila", ["methods.study[0] = 'bp_vanila'", "did you mean 'bp_vanilla'"]),
        ("catalog/groups.yaml", "  study:", "  zo_sparse:", ["methods.zo_sparse", "has this name, too"]),
        ("catalog/groups.yaml", "\nmethods:", "\nmethod:", ["unknown key 'method'", "did you mean 'methods'"]),
        ("claims.yaml", "reading: accuracy_gap", "reading: acuracy_gap", ["accuracy.reading = 'acuracy_gap'", "did you mean 'accuracy_gap'"]),
        ("claims.yaml", "  reading: accuracy_gap\n", "", ["key 'accuracy.reading' is missing"]),
        ("claims.yaml", "at_most: 1.5", "at_mots: 1.5", ["unknown key 'memory.at_mots'", "did you mean 'at_most'"]),
        ("claims.yaml", "reading: accuracy_gap", "reading: accuracy_gap\n  at_most: 2", ["unknown key 'accuracy.at_most'"]),
        ("claims.yaml", "at_least: 0.8\n  at_most: 1.25", "", ["flops_order", "'at_least', 'at_most', or both"]),
        ("claims.yaml", "[[minilm_words, minilm_words_r32]]", "[[minilm_words]]", ["scale.series[0]", "at least 2"]),
        ("claims.yaml", "[[minilm_words, minilm_words_r32]]", "[[minilm_words, minilm_wrds]]", ["scale.series: 'minilm_wrds'", "did you mean 'minilm_words'"]),
        ("claims.yaml", "[[minilm_words, minilm_words_r32]]", "[[minilm_words, bert_base]]", ["scale.series: minilm_words, bert_base must share one source"]),
        ("claims.yaml", "reading: to_target", "reading: to_target\n  series: [[minilm_words, minilm_words_r32]]", ["convergence", "'slowdown_over_d'"]),
        ("claims.yaml", "units: [points, percent]", "units: [point]", ["accuracy.magnitude.units[0] = 'point'", "did you mean 'points'"]),
        ("claims.yaml", "targets: [0.25]", "targets: [1.25]", ["effective_rank.targets[0] = 1.25"]),
        ("claims.yaml", "[1GB, 2GB", "[1XB, 2GB", ["on_device.memories", "with a unit"]),
        ("claims.yaml", "at_least: 0.8\n", "at_least: 1.8\n", ["flops_order", "at_least = 1.8 is above at_most = 1.25"]),
        ("claims.yaml", "[roberta_base, llama_3_1_8b]", "[minilm_words, llama_3_1_8b]", ["traced.models: 'minilm_words' can't be traced"]),
        ("claims.yaml", "[roberta_base, llama_3_1_8b]", "[roberta_bas, llama_3_1_8b]", ["traced.models: 'roberta_bas'", "did you mean 'roberta_base'"]),
        ("claims.yaml", "fmad_accumulate: fmad_vanilla", "fmad_accumulate: fmad_vanila", ["variance_reduction.baselines", "did you mean 'fmad_vanilla'"]),
    ],
)  # fmt: skip
def test_mistakes(workdir, file, old, new, words):
    edit(workdir / "config" / file, old, new)
    with pytest.raises(UserError) as caught:
        load_plan()
    message = str(caught.value)
    assert Path(file).name in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("studies/full_size.yaml", "    - opt_13b", "    - opt_13", ["costs.models", "did you mean 'opt_13b'"]),
        ("studies/full_size.yaml", "    - opt_13b", "    - minilm_lora", ["costs.models", "source asset, not config"]),
        ("studies/full_size.yaml", "[study, bp_selective,", "[study, bp_selectiv,", ["costs.methods", "did you mean 'bp_selective'"]),
        ("studies/full_size.yaml", "      model: llama_3_1_8b", "      model: lama", ["costs.sweeps.plans.model", "'lama'"]),
        ("studies/full_size.yaml", "values: [2, 4, 8, 16, 32]", "values: [1, 2]", ["costs.sweeps.directions", "'spread' needs directions.count >= 2"]),
        ("studies/full_size.yaml", "[8GB, 16GB", "[8GB, 16XB", ["costs.fits.cards", "with a unit, as 24GB"]),
    ],
)  # fmt: skip
def test_mistakes_with_costs(workdir, file, old, new, words):
    edit(workdir / "config" / file, old, new)
    with pytest.raises(UserError) as caught:
        load_plan([Path("config/studies/full_size.yaml")])
    for word in (Path(file).name, *words):
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_study_needs_the_one_reference_of_its_claims(workdir):
    block = {"models": ["minilm_lora"], "tasks": ["trec"], "budgets": ["units_240"]}
    study = Path("study.yaml")
    study.write_text(yaml.safe_dump({"experiments": [{**block, "methods": ["zo_vanilla"]}]}))
    with pytest.raises(UserError, match=r"study.yaml: .*exactly one method.*bp_checkpointing"):
        load_plan([study])


def test_a_mistake_in_claims_ends_validate(workdir):
    edit(workdir / "config/claims.yaml", "reading: accuracy_gap", "reading: acuracy_gap")
    found = CliRunner().invoke(app, ["validate"])
    assert found.exit_code != 0 and "did you mean 'accuracy_gap'" in str(found.exception)


def test_a_change_of_claims_changes_no_run(workdir):
    before = load_plan()
    edit(workdir / "config/claims.yaml", "at_most: 1.5", "at_most: 2")
    after = load_plan()
    assert before.claims_key() != after.claims_key()
    assert before.texts_key() == after.texts_key()
    for cell in before.cells():
        assert before.specs(cell) == after.specs(cell)


def test_a_model_without_weights_is_not_trained(workdir):
    file = workdir / "config/catalog/models.yaml"
    edit(
        file,
        "    weights: {repo: facebook/opt-13b, revision: e515202d1e7750da62d245fbccb2723b9c1790f5}\n",
        "",
    )
    edit(workdir / "config/config.yaml", "[minilm_block]", "[opt_13b]")
    with pytest.raises(
        UserError, match=r"experiments\[3\].models\[0\] = 'opt_13b' serves .*fit` alone"
    ):
        load_plan()


EXACT = {"kind": "exact"}
CENTRAL = {"kind": "central", "eps": 1e-3}
ONE = {"kind": "gaussian", "count": 1}
SVRG = {"svrg": {"period": 5, "snapshot_batches": 2}}


def projected(oracle=EXACT, directions=ONE, **options):
    return {
        "estimator": {"kind": "projected", "oracle": oracle, "directions": directions} | options
    }


def sparse(**options):
    return projected(directions={"kind": "sparse", "fraction": 0.1, "refresh": 5} | options)


def low_rank(**options):
    return projected(directions={"kind": "low_rank", "rank": 2} | options)


def calibrated(**options):
    return projected(directions={"kind": "calibrated", "every": 5} | options)


def backprop(**options):
    return {"estimator": {"kind": "backprop"} | options}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (projected(directions=ONE | {"count": 0}), ["directions.count = 0", "greater than or equal to 1"]),
        (projected(directions=ONE | {"count": 1.5}), ["directions.count = 1.5", "integer"]),
        (projected(EXACT | {"chunk": 0}), ["oracle.chunk = 0", "greater than or equal to 1"]),
        (projected(CENTRAL | {"eps": 0}), ["oracle.eps = 0", "greater than 0"]),
        (projected(CENTRAL | {"eps": -1e-3}), ["oracle.eps = -0.001", "greater than 0"]),
        (projected({"kind": "one_sided", "eps": 0}), ["oracle.eps = 0", "greater than 0"]),
        (projected(CENTRAL | {"batched": "allways"}), ["oracle.batched = 'allways'", "did you mean 'always'"]),
        (projected({"kind": "centrel"}), ["oracle.kind = 'centrel'", "did you mean 'central'"]),
        (projected(EXACT | {"eps": 1e-3}), ["unknown key", "oracle.eps", "allowed: chunk, kind"]),
        (projected(directions={"kind": "gausian"}), ["directions.kind = 'gausian'", "did you mean 'gaussian'"]),
        (projected(directions={"kind": "lowrank"}), ["directions.kind = 'lowrank'", "did you mean 'low_rank'"]),
        (projected(directions=ONE | {"rank": 2}), ["unknown key", "directions.rank", "allowed: count, kind"]),
        (sparse(fraction=0), ["directions.fraction = 0", "greater than 0"]),
        (sparse(fraction=1.01), ["directions.fraction = 1.01", "less than or equal to 1"]),
        (sparse(refresh=0), ["directions.refresh = 0", "greater than or equal to 1"]),
        (low_rank(rank=0), ["directions.rank = 0", "greater than or equal to 1"]),
        (low_rank(refresh=0), ["directions.refresh = 0", "greater than or equal to 1"]),
        (calibrated(every=0), ["directions.every = 0", "greater than or equal to 1"]),
        (calibrated(candidates=0), ["directions.candidates = 0", "greater than or equal to 1"]),
        (calibrated(use="scales"), ["directions.use = 'scales'", "did you mean 'scale'"]),
        (projected(scale="legacy"), ["scale 'legacy' multiplies by eps", "oracle 'exact'"]),
        (projected(scale="spread"), ["scale 'spread' needs directions.count >= 2"]),
        (projected(CENTRAL, scale="spred"), ["scale = 'spred'", "did you mean 'spread'"]),
        (projected(clip=0), ["clip = 0", "greater than 0"]),
        (backprop(mebibytes=8), ["'mebibytes' goes with plan 'byte_budget'"]),
        (backprop(plan="byte_budget"), ["'mebibytes' goes with plan 'byte_budget'"]),
        (backprop(plan="byte_budget", mebibytes=0), ["mebibytes = 0", "greater than 0"]),
        (backprop(plan="per_blok"), ["plan = 'per_blok'", "did you mean 'per_block'"]),
        ({"svrg": {"period": 0, "snapshot_batches": 8}}, ["svrg.period = 0", "greater than or equal to 1"]),
        ({"svrg": {"period": 5, "snapshot_batches": 0}}, ["svrg.snapshot_batches = 0"]),
        ({"svrg": {"period": 5}}, ["svrg.snapshot_batches' is missing"]),
        (calibrated() | SVRG, ["'svrg' subtracts two estimates along the same directions"]),
        ({"estimator": {"kind": "hessian_informed"}} | SVRG, ["'svrg' subtracts two estimates"]),
        ({"estimator": {"kind": "local_guess"}} | SVRG, ["'svrg' subtracts two estimates"]),
        ({"accumulate": 0}, ["accumulate = 0", "greater than or equal to 1"]),
        ({"clip_norm": 0}, ["clip_norm = 0", "greater than 0"]),
        ({"sign": "maybe"}, ["sign = 'maybe'", "boolean"]),
        ({"estimator": {"kind": "hessian_informed", "smoothing": 0}}, ["estimator.smoothing = 0"]),
        ({"estimator": {"kind": "local_guess", "oracle": {"kind": "central"}}}, ["oracle.kind = 'central'", "allowed: exact"]),
        ({"estimator": {"kind": "python", "file": "missing.py"}}, ["there is no file missing.py"]),
        ({"estimator": {"kind": "backprob"}}, ["estimator.kind = 'backprob'", "did you mean 'backprop'"]),
        ({"accumulat": 4}, ["unknown key 'methods.zo_vanilla.accumulat'", "did you mean 'accumulate'"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_mistakes_in_a_method(workdir, change, words):
    path = workdir / "config/catalog/methods.yaml"
    data = yaml.safe_load(path.read_text())
    data["zo_vanilla"] |= change
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError) as caught:
        load_plan()
    message = str(caught.value)
    assert "\n" not in message
    for word in ["methods.yaml", "zo_vanilla", *words]:
        assert word in message, message


def test_blame_falls_on_the_overlay(workdir):
    overlay = workdir / "mine.yaml"
    overlay.write_text("study: mine\nseeds: [zero]\n")
    with pytest.raises(UserError, match=r"^mine\.yaml: seeds\[0\] = 'zero'"):
        load_plan([Path("mine.yaml")])


def test_command_prints_one_line_and_fails(costbp, workdir):
    edit(workdir / "config/config.yaml", "zo_multiple, lozo", "zo_multipel, lozo")
    done = costbp("validate")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'zo_multiple'" in done.stderr


def test_overlay_replaces_lists_and_merges_mappings(workdir):
    plan = load_plan([Path("config/studies/smoke.yaml")])
    assert plan.name == "smoke"
    assert plan.study.paths.reports == Path("reports/smoke")
    assert plan.study.paths.store == Path("runs")
    assert {cell.task for cell in plan.cells()} == {"docstrings"}


def test_hash_covers_what_changes_a_result_and_nothing_else(workdir):
    cell = Cell("tiny_lora", "docstrings", "zo_vanilla", "units_96")
    before = load_plan().spec(cell, 0).hash
    edit(workdir / "config/catalog/methods.yaml", "label: ZO-Vanilla", "label: MeZO")
    assert load_plan().spec(cell, 0).hash == before
    edit(workdir / "config/catalog/methods.yaml", "{kind: central}", "{kind: central, eps: 1.0e-2}")
    assert load_plan().spec(cell, 0).hash != before
    assert load_plan().spec(cell, 1).hash != load_plan().spec(cell, 0).hash


def test_every_schema_that_a_file_names_is_there():
    for file in sorted((ROOT / "config").rglob("*.yaml")):
        named = re.match(r"# yaml-language-server: \$schema=(\S+)", file.read_text())
        assert named is None or (file.parent / named[1]).is_file(), file


def test_schemas_are_in_step_and_accept_what_ships():
    for name, text in schemas().items():
        path = ROOT / "workflow/schemas" / name
        assert path.read_text() == text, f"{name}: run `costbp schemas`"
        kind = name.removesuffix(".schema.json")
        files = {"study": "config.yaml", "claims": "claims.yaml"}
        file = files.get(kind, f"catalog/{kind}.yaml")
        jsonschema.validate(
            yaml.safe_load((ROOT / "config" / file).read_text()), yaml.safe_load(text)
        )


def test_what_a_study_can_name_is_listed_without_torch(workdir):
    listed = CliRunner().invoke(app, ["list", "models", "--json"])
    assert set(json.loads(listed.stdout)) == set(load_plan().catalog.models)
    everything = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert set(everything) == {*Catalog.model_fields, "groups", "claims", "studies"}
    assert everything["studies"]["smoke"]["file"] == "config/studies/smoke.yaml"
    assert "accuracy_gap" in CliRunner().invoke(app, ["list", "claims"]).stdout
    wrong = CliRunner().invoke(app, ["list", "model"])
    assert "did you mean 'models'" in str(wrong.exception)
    script = "import sys; from costbp.cli import app; app(['list'], standalone_mode=False)"
    script += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_groups_of_one_name_are_listed_by_kind(workdir):
    with Path("config/catalog/groups.yaml").open("a") as stream:
        stream.write("\nmodels:\n  study: [minilm_lora]\n")
    listed = json.loads(CliRunner().invoke(app, ["list", "groups", "--json"]).stdout)
    assert set(listed) == {"methods.study", "methods.beyond", "models.study"}
    assert listed["models.study"]["members"] == "minilm_lora"


def test_a_group_stands_for_its_members(workdir):
    study = Path("study.yaml")
    block = {"models": ["minilm_lora"], "tasks": ["trec"], "budgets": ["units_240"]}
    names = ["fzoo", "study", "zo_vanilla"]
    study.write_text(yaml.safe_dump({"experiments": [{**block, "methods": names}]}))
    methods = [cell.method for cell in load_plan([study]).cells()]
    assert len(methods) == 16 and methods[:2] == ["fzoo", "bp_vanilla"]
    Path("config/catalog/groups.yaml").unlink()
    with pytest.raises(UserError, match="'study' is not in"):
        load_plan([study])


@pytest.mark.parametrize("most", [1, 4, 100])
def test_each_experiment_is_in_one_job_of_at_most_so_many_methods(monkeypatch, most):
    monkeypatch.chdir(ROOT)
    plan = load_plan()
    resources = plan.study.resources.model_copy(update={"methods_per_job": most})
    study = plan.study.model_copy(update={"resources": resources})
    jobs = list(plan.model_copy(update={"study": study}).jobs())
    found = [Cell(m, t, name, budget) for m, t, budget, names in jobs for name in names]
    assert sorted(found) == sorted(plan.cells())
    sizes = [len(names) for *_, names in jobs]
    assert max(sizes) <= most and (most > 1 or len(jobs) == len(found))
    hashes = [plan.hashes(m, t, "+".join(names), budget) for m, t, budget, names in jobs]
    assert sum(map(len, hashes)) == plan.runs == len({h for part in hashes for h in part})
