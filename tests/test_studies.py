"""Every shipped study made small, from what it fetches to its page; `paper`, as long as all others, is
in a file of its own."""

from __future__ import annotations

import pytest

from tests.small_studies import SHIPPED, check_report, lay_over, run_jobs, shortened, snakemake


@pytest.fixture(scope="module", autouse=True)
def copy(tmp_path_factory):
    with shortened(tmp_path_factory.mktemp("studies")):
        yield


@pytest.mark.parametrize("study", [s for s in SHIPPED if s not in ("paper", "full_size")])
def test_a_shipped_study_runs_to_its_report(study):
    plan, words = lay_over(study)
    whole = study == "gpu-demo"  # importing MLflow takes seconds
    run_jobs(*words, without=() if whole else ("track",))
    check_report(plan)
    if whole:
        assert "Nothing to be done" in snakemake("-n", *words)


def test_costs_at_full_size_reach_their_page():
    plan, words = lay_over("full_size")
    run_jobs("costs", *words)
    page = (plan.study.paths.reports / "costs/index.html").read_text()
    assert plan.study.costs is not None
    for model in plan.study.costs.models:
        assert plan.catalog.models[model].label.partition(",")[0] in page
    assert "Nothing to be done" in snakemake("-n", "costs", *words)
