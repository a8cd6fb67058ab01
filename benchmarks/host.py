"""Host time of a step over that of a forward, on models so small that nothing else takes time.

``OMP_NUM_THREADS=1 python -m benchmarks.host``: what Python and torch's dispatch spend before a device has
anything to do. A GPU that is faster than this waits for the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.families import family_batch, family_objective
from costbp.config.load import load_plan
from costbp.cost.step import forward_only
from costbp.objective import Key

METHODS = ("bp_vanilla", "zo_vanilla", "fmad_vanilla", "fmad_multiple")
CASES = {
    "BERT, 2 layers, hidden 64, 8 x 32": ("bert", {"hidden": 64, "layers": 2}, (8, 32)),
    "Llama, 2 layers, hidden 64, 8 x 32": ("llama", {"hidden": 64, "layers": 2}, (8, 32)),
    "Llama, 32 layers, hidden 32, 1 x 80": (
        *("llama", {"hidden": 32, "layers": 32, "heads": 2}, (1, 80)),
    ),
}


def processor_seconds(run: Callable[[], object], times: int = 7) -> float:
    """Median processor time of ``run()`` after one warm-up."""
    run()
    spent = []
    for _ in range(times):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def main() -> None:
    torch.set_num_threads(1)
    methods = load_plan().catalog.methods
    print(f"| model, LoRA r=1 | forward, ms | {' | '.join(METHODS)} |\n|{'---|' * 6}")
    for name, (family, sizes, shape) in CASES.items():
        objective, data = family_objective(family, **sizes), family_batch(family, *shape)
        forward = processor_seconds(lambda o=objective, d=data: forward_only(o, d))  # type: ignore[misc]
        cells = []
        for method in METHODS:
            estimator = methods[method].build()
            step = processor_seconds(
                lambda e=estimator, o=objective, d=data: e.estimate(o, [d], Key(0, 0))  # type: ignore[misc]
            )
            cells.append(f"{step / forward:.2f}")
        print(f"| {name} | {1e3 * forward:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
