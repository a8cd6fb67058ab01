"""Predicted bytes against measured ones: a trace without weights beside the same steps on a device.

``python -m benchmarks.predicted --device cuda`` needs no download: weights are random. What is measured
is the sum of live storages, by category, and on CUDA also what torch's allocator says.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from costbp.config.load import load_plan, overlaid
from costbp.console import say
from costbp.cost.bench import Bench
from costbp.cost.record import CostRecord
from costbp.errors import UserError

METHODS = ("bp_vanilla", "bp_checkpointing", "fmad_vanilla", "zo_vanilla")
MODELS = ("llama_3_1_8b", "qwen2_vl_7b")
TARGET = 0.05  # of the allocator's peak


def compare(
    name: str, device: str, batch: int, length: int, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row a method: bytes beyond what stays between steps, predicted and measured."""
    plan = load_plan()
    entry = overlaid(plan.catalog.models[name], settings, "--set")
    rows = []
    found: dict[str, dict[str, CostRecord]] = {}
    for place in ("meta", device):
        bench = Bench(entry, place)
        found[place] = {
            method: bench.cost(method, plan.catalog.methods[method], batch, length)
            for method in METHODS
        }
        del bench
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    for method in METHODS:
        predicted, measured = found["meta"][method], found[device][method]
        truth = measured.allocated_bytes or measured.peak_bytes
        errors = {
            category: abs(predicted.peak_by_category.get(category, 0) - size) / size
            for category, size in measured.peak_by_category.items()
            if size > 0.01 * measured.peak_bytes
        }
        rows.append(
            {
                "model": name,
                "method": method,
                "predicted": predicted.peak_bytes,
                "live": measured.peak_bytes,
                "allocated": measured.allocated_bytes,
                "error": predicted.peak_bytes / truth - 1,
                "errors_by_category": errors,
                "seconds": measured.seconds,
                "forwards": measured.time,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, and the median absolute error of the total and of each category."""
    lines = [
        "| model | method | predicted, MiB | live, MiB | allocated, MiB | error | time, forwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        allocated = "-" if row["allocated"] is None else f"{row['allocated'] / 2**20:,.1f}"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['predicted'] / 2**20:,.1f} | "
            f"{row['live'] / 2**20:,.1f} | {allocated} | {row['error']:+.2%} | {row['forwards']:.2f} |"
        )
    total = statistics.median(abs(row["error"]) for row in rows)
    lines += ["", f"Median absolute error of the total: {total:.2%}."]
    names = dict.fromkeys(name for row in rows for name in row["errors_by_category"])
    for name in names:
        errors = [r["errors_by_category"][name] for r in rows if name in r["errors_by_category"]]
        lines.append(f"- {name}: {statistics.median(errors):.2%}, over {len(errors)} steps")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    settings = {"source.bits": None}  # bfloat16 weights
    rows = []
    try:
        for name in given.model or MODELS:
            rows += compare(name, given.device, given.batch, given.seq, settings)
    except UserError as error:
        say(f"benchmarks.predicted: {error}")
        return error.code
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    text = (
        f"{device}, torch {torch.__version__}, batch {given.batch} x {given.seq}\n\n{table(rows)}"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "predicted.json").write_text(json.dumps(rows, indent=2) + "\n")
    (given.out / "predicted.md").write_text(text)
    print(text)
    return 0 if all(abs(row["error"]) <= TARGET for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
