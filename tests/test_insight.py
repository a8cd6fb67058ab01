"""Insight: formulas against Monte Carlo, curvature and stable rates against known Hessians, the page."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

from costbp.config import load_plan
from costbp.config.insight import Insight, Quadratic
from costbp.errors import UserError
from costbp.insight import curvature, descent, estimates, points
from costbp.insight.measure import measure
from costbp.insight.page import sentences
from costbp.insight.problems import Bench, quadratic
from costbp.theory.descent import effective_rank, masked_error, participation, slow_down
from tests.small import examples, network
from tests.small_studies import run_jobs

D = 12
TOP = {"kind": "quadratic", "d": D}


def bowl(decay: float = 0.0) -> Bench:
    return Bench.made("bowl", *quadratic(Quadratic(**TOP, decay=decay)))


# --- theory ----------------------------------------------------------------------------------------


def test_the_slow_down_is_that_of_the_expected_second_order_term():
    """E[g_hat^T H g_hat] by a draw of many estimates, against (1 + (r + 1) / K) L |g|^2 where equal."""
    torch.manual_seed(0)
    g, count = torch.randn(D, dtype=torch.float64), 3
    z = torch.randn(40_000, count, D, dtype=torch.float64)
    found = (z * (z @ g)[..., None]).mean(1)
    second = found.square().sum(1)  # H = I: L = 1, r = d
    wanted = slow_down(D, count) * float(g @ g)
    assert float(second.mean()) == pytest.approx(wanted, abs=4 * float(second.std()) / 200)
    curvatures = torch.arange(1, D + 1, dtype=torch.float64).reciprocal()
    bound = slow_down(float(curvatures.sum()), count) * float(g @ g)
    assert float((found.square() @ curvatures).mean()) < bound < wanted


def test_the_error_on_a_mask_is_its_bias_and_its_variance():
    torch.manual_seed(1)
    g = torch.randn(D, dtype=torch.float64)
    mask = torch.arange(D) < 4
    z = torch.randn(40_000, 2, D, dtype=torch.float64) * mask
    found = (z * (z @ g)[..., None]).mean(1)
    errors = (found - g).square().sum(1) / g.square().sum()
    share = float(g[mask].square().sum() / g.square().sum())
    wanted = masked_error(4, share, 2)
    assert float(errors.mean()) == pytest.approx(wanted, abs=4 * float(errors.std()) / 200)


# --- curvature -------------------------------------------------------------------------------------


def test_effective_rank_of_a_known_hessian_is_exact():
    bench = bowl(decay=1.0)
    values = bench.batch["curvatures"]
    found = curvature.spectrum(bench, seed=0)
    assert found.largest == pytest.approx(float(values.max()))
    assert found.rows["effective rank"] == pytest.approx(
        [float(values.sum() / values.max())] * curvature.PROBES
    )
    assert found.squares == pytest.approx([float(values.square().sum())] * curvature.PROBES)
    flat = curvature.spectrum(bowl(), seed=0)
    assert flat.rows["effective rank"] == pytest.approx([D] * curvature.PROBES)
    assert participation(D, D) == effective_rank(D, 1) == D


def test_the_spectrum_of_a_network_is_that_of_its_dense_hessian():
    objective, data = network(), examples()
    with torch.no_grad():
        objective.theta.mul_(3)  # away from where curvatures are alike
    bench = Bench.made("network", objective, data)
    dense = torch.func.hessian(lambda theta: objective.at(theta, data))(bench.home)
    values = torch.linalg.eigvalsh(dense)
    assert float(values[0]) < -1e-3  # the positive part is another matrix
    product, v = curvature.hessian(bench), torch.ones(bench.d, dtype=torch.float64)
    torch.testing.assert_close(product(v), dense @ v)
    found = curvature.spectrum(bench, seed=0)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-3)
    mean, low, high = points.interval(found.traces)
    assert low < float(values.clamp(min=0).sum()) < high and high - low < mean


# --- descent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1e-3, 1.0, 300.0])
def test_gradient_descent_is_stable_up_to_two_over_the_curvature(guess):
    rate = descent.largest_rate(bowl(), descent.BP, 200, 0, guess)
    assert rate == pytest.approx(2.0, rel=descent.CLOSE - 1)


def test_stable_rates_of_estimates_are_those_of_theory():
    """Equal curvatures: 2 / (1 + (d + 1) / K), whatever the search begins with."""
    bench = Bench.made("bowl", *quadratic(Quadratic(kind="quadratic", d=200)))
    for count in (1, 8):
        rates = [descent.largest_rate(bench, count, 60, seed, 0.1) for seed in range(6)]
        mean = math.exp(sum(map(math.log, rates)) / len(rates))
        assert mean == pytest.approx(2 / slow_down(200, count), rel=0.15)


def test_steps_to_a_loss_are_counted_from_the_start():
    """Equal curvatures at rate a: the loss is (1 - a)^(2 t) of the first."""
    bench = bowl()
    first = D / 2
    found = descent.steps_to(bench, descent.BP, 0.5, [first * 0.3, first * 0.01, 0.0], 20, 0)
    assert found == [1, 4, None]
    assert torch.equal(bench.objective.theta, bench.home)


# --- estimates -------------------------------------------------------------------------------------


def test_estimates_lie_where_their_formulas_say():
    """Every kind, on a network in float64: the mean of 60 repeats within its own interval, widened."""
    insight = Insight(problems={"x": TOP}, draws=2, repeats=60)
    bench = Bench.made("network", network(), examples())
    found = list(estimates.estimates(bench, insight, list(estimates.KINDS), [9]))
    assert {p.series for p in found} == set(estimates.KINDS)
    assert {p.oracle for p in found} == {"exact", "central"}
    for point in found:
        assert point.predicted is not None
        slack = 1.5 * (point.high - point.low)
        if point.question == "cosine":
            slack += 0.03  # the formula is that of many dimensions
        assert slack < point.predicted
        assert abs(point.measured - point.predicted) < slack, point


def test_intervals_cover_the_mean_of_their_values():
    mean, low, high = points.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert points.interval([2.0]) == (2.0, 2.0, 2.0)


# --- page and workflow -----------------------------------------------------------------------------


def row(**changes):
    values = {"title": "A", "question": "slow_down", "count": 1, "given_up": 0, "measured": 6.0}
    return values | {"low": 5.0, "high": 7.0, "predicted": 1500.0, "by_rank": 6.2} | changes


def test_sentences_say_what_is_off_and_what_is_a_bound():
    rows = [row(), row(count=4, measured=2.0, low=1.5, high=2.5, by_rank=4.0), row(given_up=1)]
    (text,) = sentences(pd.DataFrame(rows), "slow_down")
    assert "by d, measured / predicted is 0.00133 to 0.004; off in 2 of 2." in text
    assert "0.5 to 0.968; off in 1 of 2." in text
    assert "nearer in 2 of 2" in text and "1 of 3 points are bounds" in text
    (text,) = sentences(pd.DataFrame([row(given_up=1)]), "slow_down")
    assert "nothing is compared" in text


SETTINGS = """
insight:
  problems:
    tiny: {kind: model, model: tiny_head, task: docstrings, examples: 4}
    steep: {kind: quadratic, d: 16, decay: 1}
  counts: [1, 4]
  draws: 4
  repeats: 2
  descents: 2
  steps: 5
  reach: [2]
  longest: 200
entries: {tasks: {docstrings: {validation: 8, test: 8}}}
"""


@pytest.fixture
def tiny(workdir, monkeypatch):
    path = workdir / "config/config.yaml"
    text = path.read_text()
    start = text.index("\ninsight:")
    stop = text.index("\npaths:")
    path.write_text(text[:start] + SETTINGS + text[stop:])
    monkeypatch.setattr("costbp.tasks.docstrings.PER_CLASS", 30)
    return workdir


def test_the_workflow_ends_in_a_page(tiny):
    run_jobs("insight")
    folder = tiny / "reports/insight"
    table = pd.read_csv(folder / "points.csv")
    assert set(table["question"]) == {"cosine", "error", "rate", "slow_down", "curvature"}
    assert set(table["problem"]) == {"tiny", "steep"}
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 4
    for name in ("cosine", "error", "rate", "slow_down"):
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "2 to 4 repeats a point" in page and " nan" not in page and ">nan" not in page


def mistaken(workdir, old, new):
    path = workdir / "config/config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        load_plan()
    return str(caught.value)


def test_mistakes_are_named_before_anything_runs(tiny):
    assert "insight.problems.tiny.model = 'tiny_hea'" in mistaken(tiny, "tiny_head,", "tiny_hea,")


def test_a_kind_of_direction_must_be_there(tiny):
    said = mistaken(tiny, "decay: 1}", "decay: 1, directions: [gauss]}")
    assert (
        "steep.directions[0] = 'gauss' is not known" in said and "did you mean 'Gaussian'" in said
    )


def test_a_problem_that_is_not_there_is_refused(tiny):
    with pytest.raises(UserError, match=r"no 'stepp'; .*did you mean 'steep'"):
        list(measure(load_plan(), "stepp"))


def test_what_insight_fetches_is_not_fetched_for_a_study(workdir):
    plan = load_plan()
    wanted = set(plan.assets(insight=True))
    assert set(plan.assets()) <= wanted
    offline = load_plan([workdir / "config/studies/offline.yaml"])
    assert not offline.assets() and "minilm" in offline.assets(insight=True)
    assert json.loads(plan.model_dump_json())["study"]["insight"]["problems"]
