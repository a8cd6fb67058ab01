"""`costbp cost --published`: predictions beside what others measured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from costbp.config.study import Plan
from costbp.console import table, track
from costbp.cost.published import (
    FOLDER,
    Score,
    difference_scores,
    pairs,
    predict,
    scores,
)

GB = 1e9


def show_published(study: Plan, path: Path | None, as_json: bool) -> None:
    """Trace every row that can be expressed, and show errors by row, source and difference.

    Raises:
        UserError: a file can't be read.
    """
    path = path or FOLDER / "measurements.csv"
    rows = list(predict(study, path, lambda given: track(given, "tracing published rows")))
    apart = pairs(rows)
    if as_json:
        found = {
            "rows": [asdict(row) for row in rows],
            "differences": [asdict(pair) for pair in apart],
            "scores": [asdict(score) for score in scores(rows)],
            "difference_scores": [asdict(score) for score in difference_scores(apart)],
        }
        print(json.dumps(found, indent=2))
        return
    traced = [row for row in rows if row.predicted is not None]
    head = ("source", "model", "method", "batch", "tokens", "published", "predicted", "error")
    table(
        f"{path}: GB, {len(traced)} of {len(rows)} rows expressed",
        head,
        [
            (
                *(row.source, row.model, row.method, row.batch, row.seq),
                f"{row.published / GB:.2f}",
                f"{(row.predicted or 0) / GB:.2f}",
                f"{100 * row.error:+.1f} %" if row.absolute else "difference alone",
            )
            for row in traced
        ],
    )
    _show("by source", "source", scores(rows))
    _show("differences of two rows", "what differs", difference_scores(apart))
    left = Counter((row.source, row.why) for row in rows if row.predicted is None)
    words = [(source, str(count), why) for (source, why), count in left.items()]
    table("not expressed", ("source", "rows", "why"), words)


def _show(title: str, name: str, found: list[Score]) -> None:
    head = (name, "rows", "median error", "80th of 100", "bias", "closed form's median error")
    rows = [
        (
            *(score.name, str(score.count)),
            *(f"{100 * value:.1f} %" for value in (score.median, score.eighty)),
            f"{100 * score.bias:+.1f} %",
            "-" if score.rival != score.rival else f"{100 * score.rival:.1f} %",
        )
        for score in found
    ]
    table(title, head, rows)
