"""The whole study made small: nine models, seven tasks and fifteen methods, from the hub to the page."""

from __future__ import annotations

import pytest

from tests.small_studies import ONE_STEP, check_report, lay_over, run_jobs, shortened


@pytest.mark.timeout(900)  # 375 runs
def test_the_whole_study_runs_to_its_report(tmp_path):
    with shortened(tmp_path):
        plan, words = lay_over("paper", ONE_STEP)
        run_jobs(*words, without=("track",))
        check_report(plan)
