"""Readings of what a step needs: counted, so exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from costbp.analysis.arms import Evidence, LeftOut
from costbp.analysis.finding import Finding, Measured
from costbp.analysis.readings.compare import sides
from costbp.analysis.statistics import Sample
from costbp.config.claims import CostClaim, LargestClaim
from costbp.config.costs import card_bytes
from costbp.config.study import Cell

NAMES = {
    "flops": "FLOPs of a step",
    "forward_units": "forward units of a step",
    "bytes": "bytes at a step's peak, weights included",
    "bytes_beyond": "bytes at a step's peak beyond weights",
    "activations": "bytes at a step's peak beyond weights, trained vector, gradient and state",
}


def needed(row: Any, measure: str) -> float:
    """A figure of a cost record."""
    if measure in ("flops", "forward_units"):
        return float(getattr(row, measure))
    parts = {"activations": 0, "bytes_beyond": row.state_bytes}
    return float(row.peak_bytes + parts.get(measure, row.state_bytes + row.weights_bytes))


def _tables(evidence: Evidence, claim: CostClaim) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(model, task, place, method -> cost record) of the claim's own traces, and of the study."""
    if claim.traced is not None:
        for model in claim.traced.models:
            table = evidence.traces.get(claim.traced.file(model))
            if table is not None:
                shape = f"{claim.traced.batch} x {claim.traced.seq}, traced"
                yield model, "", f"{model} ({shape})", {r.method: r for r in table.itertuples()}
    if not len(evidence.frames.costs):
        return
    for (model, task), group in evidence.frames.costs.groupby(["model", "task"], sort=False):
        if model in (claim.models or (model,)) and task in (claim.tasks or (task,)):
            yield model, task, f"{model}/{task}", {str(r.method): r for r in group.itertuples()}


def step_cost(evidence: Evidence, claim: CostClaim) -> Finding:
    """The worse's need over the better's, within the claim's bounds."""
    better, worse = sides(evidence, claim)
    low, high = claim.at_least or 0.0, claim.at_most or math.inf
    bounds = [f"at least {low:g}x"] * bool(low) + [f"at most {high:g}x"] * math.isfinite(high)
    finding = Finding(
        f"{NAMES[claim.measure][0].upper()}{NAMES[claim.measure][1:]}, {worse} over {better}: "
        f"{' and '.join(bounds)} is what is claimed.",
        f"{worse} took {' and '.join(bounds)} the {NAMES[claim.measure]} of {better}",
        "x",
        claim.magnitude,
        takes=claim.takes,
    )
    plan = evidence.plan
    for model, task, place, rows in _tables(evidence, claim):
        for pair in evidence.asked(rows, claim):
            labels = [plan.catalog.methods[name].label for name in pair]
            name = f"{labels[1]} over {labels[0]}, {place}"
            why = ""
            if plan.catalog.models[model].reads == "features":
                why = "only a head runs there"
            elif (model, task) in evidence.plain and evidence.reference in pair:
                why = f"{plan.catalog.methods[evidence.reference].label} recomputes nothing there"
            if why:
                finding.left_out.append(LeftOut(name, "plain", why))
                continue
            ratio = needed(rows[pair[1]], claim.measure) / needed(rows[pair[0]], claim.measure)
            inside = math.log(ratio / low) if low else math.inf
            inside = min(inside, math.log(high / ratio) if math.isfinite(high) else math.inf)
            sample = Sample(np.array([inside or 1e-9]), exact=True)  # on a bound: inside
            exact = Sample(np.array([math.log(ratio)]), exact=True)
            measured = Measured(
                sample, f"{ratio:.3g}x", {True: [exact]}, math.log(ratio) - sample.mean
            )
            folders = [
                folder
                for cell, arm in evidence.arms.items()
                if cell[:2] == (model, task) and cell.method in pair
                for folder in arm.folders(arm.seeds)
            ]
            finding.add(measured, name, Cell(model, task, pair[0], ""), pair[1], folders)
    return finding


def largest_model(evidence: Evidence, claim: LargestClaim) -> Finding:
    """Under each ceiling the largest model whose step fits, of the first method and of the others."""
    traced = claim.traced
    labels = [evidence.plan.catalog.methods[name].label for name in traced.methods]
    finding = Finding(
        f"Number of models, of {', '.join(traced.models)} from small to large, whose step fits under a "
        f"ceiling (traced, {traced.batch} x {traced.seq} tokens, weights included): {labels[0]}'s "
        "minus another's.",
        f"{labels[0]} could train a larger model under a ceiling than {' or '.join(labels[1:])}",
        "models",
        takes=claim.takes,
    )
    tables = {name: evidence.traces.get(traced.file(name)) for name in traced.models}
    known = {name: table for name, table in tables.items() if table is not None}
    for memory in claim.memories if known else ():
        fits: dict[str, list[str]] = {method: [] for method in traced.methods}
        for model, table in known.items():
            for row in table.itertuples():
                if row.method in fits and needed(row, "bytes") <= card_bytes(memory):
                    fits[row.method].append(model)
        for method, label in zip(traced.methods[1:], labels[1:], strict=True):
            more = len(fits[traced.methods[0]]) - len(fits[method])
            last = [
                fits[name][-1] if fits[name] else "none" for name in (traced.methods[0], method)
            ]
            # the same model of both decides nothing: sizes between those that are listed may differ
            measured = Measured(
                Sample(np.array([float(more)]), exact=True), f"{last[0]} against {last[1]}"
            )
            cell = Cell(last[0], "", traced.methods[0], memory)
            finding.add(measured, f"{labels[0]} against {label}, {memory}", cell, method, [])
    return finding
