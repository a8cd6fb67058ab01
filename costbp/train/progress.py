"""What a user sees of a running experiment: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from costbp.files import write_text
from costbp.train.loop import StepEvent, Watcher
from costbp.train.record import PROGRESS

LINES = 10  # plain lines a run
PULSE_SECONDS = 5.0  # between two writes of progress.json


def describe(event: StepEvent) -> str:
    """``loss 1.234  accuracy 0.87  12.3 steps/s``."""
    rate = event.state.step / event.state.seconds if event.state.seconds else 0.0
    accuracy = "  -" if event.accuracy is None else f"{event.accuracy:.3f}"
    return f"loss {event.loss:7.4f}  accuracy {accuracy}  {rate:7.1f} steps/s"


@contextlib.contextmanager
def watching(title: str, folder: Path) -> Iterator[Watcher]:
    """Yield a watcher that shows progress on stderr and keeps ``progress.json`` for `status`."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(title) as shown:
        last = 0.0

        def watch(event: StepEvent) -> None:
            nonlocal last
            shown(event)
            if time.monotonic() - last > PULSE_SECONDS:
                last = time.monotonic()
                seconds = event.state.seconds + event.state.evaluation_seconds
                told = {"fraction": min(event.fraction, 1.0), "seconds": seconds}
                write_text(folder / PROGRESS, json.dumps(told))

        yield watch


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Watcher]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=1.0, figures="")
        last = 0.0

        def watch(event: StepEvent) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1 or event.fraction >= 0.99:
                last = time.monotonic()
                progress.update(task, completed=min(event.fraction, 1.0), figures=describe(event))

        yield watch


@contextlib.contextmanager
def _lines(title: str) -> Iterator[Watcher]:
    shown = 0
    start = time.monotonic()

    def watch(event: StepEvent) -> None:
        nonlocal shown
        if int(event.fraction * LINES) > shown:
            shown = int(event.fraction * LINES)
            passed = time.monotonic() - start
            left = passed * (1 - event.fraction) / max(event.fraction, 1e-9)
            text = f"{title}  {100 * event.fraction:3.0f} %  {describe(event)}  {left:5.0f} s left"
            print(text, file=sys.stderr, flush=True)

    yield watch
