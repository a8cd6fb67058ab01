"""An independent oracle for the floor of forward mode: stock ``torch.func.jvp``, taught at another
level that a product with a zero tensor is a zero tensor.

Our rules look at ``F.linear``. Here products of matrices are registered for torch's own ZeroTensor
dispatch key, which stands for tangents that are absent. That is global and can't be undone in a
process, hence one of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.families import FAMILIES
from tests.conftest import ROOT

SCRIPT = """
import json, sys
import torch
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode
from costbp.estimators.directions import Gaussian
from costbp.estimators.oracles import Exact
from costbp.meter import Meter
from costbp.objective import Key
from tests.small import small_model

torch.set_num_threads(1)
problems = {}
for family in sys.argv[1:]:
    objective, data = small_model(family, torch.float32, attention="eager")
    problems[family] = objective, data, Gaussian().draw(objective, Key(7, 3), 1)

def counted(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value = run()
    by_operator = counter.get_flop_counts()["Global"]
    return {str(k).removeprefix("aten."): v for k, v in by_operator.items()}, float(value)

def ours(family):
    objective, data, z = problems[family]
    return counted(lambda: Exact()(objective, data, z)[1])

def stock(family):
    objective, data, z = problems[family]
    at = lambda theta: objective.at(theta, data)
    return counted(lambda: jvp(at, (objective.theta,), (z.dense[0],))[1])

found = {family: {"ours": ours(family), "untaught": stock(family)} for family in problems}
for family, (_, data, z) in problems.items():
    with Meter() as meter:
        _, slope = Exact()(small_model(family, torch.float32)[0], data, z)
    found[family]["fused"] = meter.flops, float(slope)

def zero(like, *shape):
    return torch._efficientzerotensor(shape, dtype=like.dtype, device=like.device)

rules = torch.library.Library("aten", "IMPL")
rules.impl("mm", lambda a, b: zero(a, a.shape[0], b.shape[1]), "ZeroTensor")
rules.impl("bmm", lambda a, b: zero(a, *a.shape[:2], b.shape[2]), "ZeroTensor")
for family in problems:
    found[family]["taught"] = stock(family)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *FAMILIES],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_at_the_floor_of_stock_forward_mode(family, counts):
    (ours, slope), (taught, wanted) = counts[family]["ours"], counts[family]["taught"]
    untaught, _ = counts[family]["untaught"]
    assert slope == pytest.approx(wanted, rel=1e-4)
    linear = {"mm", "addmm"}
    assert {k: v for k, v in ours.items() if k in linear} == {
        k: v for k, v in taught.items() if k in linear
    }
    assert untaught["mm"] > 1.3 * ours["mm"]  # what there was to save
    # Keys of the first adapted block carry no tangent; our rules leave eager attention alone, so
    # that there queries meet a zero: 2 rows x 2 heads of 8 x 16 by 16 x 8.
    assert ours["bmm"] - taught["bmm"] == 2 * 4 * 8 * 16 * 8
    fused, slope = counts[family]["fused"]  # whose rule meets none
    assert slope == pytest.approx(wanted, rel=1e-4)
    assert fused == sum(taught.values())
    others = set(ours) - linear - {"bmm"}
    assert {k: ours[k] for k in others} == {k: taught[k] for k in others}
