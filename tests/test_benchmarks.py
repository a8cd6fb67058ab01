"""The benchmarks run, and hold FLOPs against targets, at sizes small enough for a test."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.bench import QUICK, Bench
from benchmarks.closed_form import products
from benchmarks.entries import ENTRIES
from benchmarks.families import FAMILIES
from benchmarks.rows import Check, Cost


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(QUICK)


def checks_of(bench: Bench, entry: str) -> list[Check]:
    bench.results.checks.clear()
    ENTRIES[entry](bench)
    assert not bench.results.misses(strict=True)
    return bench.results.checks


def test_forward_mode_runs_the_products_of_the_closed_form(bench):
    checks = checks_of(bench, "fmad_one")
    errors = [c for c in checks if c.quantity == "FLOPs, error of closed form"]
    assert [c.case.split()[0] for c in errors] == list(FAMILIES)
    assert all(c.measured < c.target == 0.005 for c in errors)
    # what a rule that multiplies by zero tangents of frozen weights would cost
    stock = [cost for cost in bench.results.costs if cost.method == "stock jvp"]
    ours = [cost for cost in bench.results.costs if cost.method == "FmAD K=1"]
    assert all(a.units < 0.8 * b.units for a, b in zip(ours, stock, strict=True))


def test_zeroth_order_costs_two_forwards_and_leaves_theta_alone(bench):
    checks = checks_of(bench, "zo_central")
    assert {c.measured for c in checks if c.kind == "flops"} == {2.0}
    changed = {c.what: c.measured for c in checks if c.quantity == "share of theta changed"}
    assert changed["ZO central K=1"] == 0 < 0.2 < changed["ZO in place (MeZO)"]


def test_closed_form_grows_by_the_factors_that_carry_tangents(bench):
    case = bench.case("bert", 1, 8)
    seen = products(case.objective, case.batch)
    none, one, two = seen.flops
    assert min(seen.flops) > 0  # below the first adapter; frozen layers; attention and adapters
    assert seen.forward_mode(3) == none + 4 * one + 7 * two


@pytest.mark.parametrize(
    ("kind", "strict", "code"), [("flops", False, 1), ("time", False, 0), ("time", True, 1)]
)
def test_the_command_tells_misses_by_its_exit_code(kind, strict, code, tmp_path, monkeypatch):
    def entry(bench: Bench) -> None:
        bench.results.costs.append(Cost("tiny", "bert 1x8", "ours", False, 2.0, 2.5, None))
        bench.results.checks.append(Check("ours", "some", kind, "bert 1x8", 2.0, 1.9))

    monkeypatch.setitem(ENTRIES, "tiny", entry)
    words = ["--quick", "--only", "tiny", "--out", str(tmp_path), *["--strict"] * strict]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    assert "MISSED 1 of 1" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["threads"] == 1
    assert [check["ok"] for check in found["checks"]] == [False]
    assert (tmp_path / "costs.png").stat().st_size > 10_000


def test_unknown_entries_are_refused():
    result = CliRunner().invoke(app, ["--only", "nothing"])
    assert result.exit_code == 2
    assert "fmad_one" in result.output or "unknown" in result.output
