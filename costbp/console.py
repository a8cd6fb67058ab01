"""What commands print: messages on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
PAUSE = 10.0  # seconds between lines of a log
COLORS = (
    "blue",
    "magenta",
    "cyan",
    "bright_black",
    "green",
    "yellow",
    "red",
    "bright_blue",
    "white",
)


def say(text: str) -> None:
    """One line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; a log, which has no width, gets 120 columns."""
    shown = Table(title=title or None, title_justify="left", header_style="bold")
    for name in head:
        shown.add_column(name)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(shown)


def bar(parts: Mapping[str, float], most: float, width: int = 24) -> Text:
    """A stacked bar, ``width`` cells for ``most``, with the two largest parts in words."""
    shown = Text()
    for color, (_, size) in zip(COLORS, parts.items(), strict=False):
        shown.append("█" * round(width * size / max(most, 1)), color)
    total = sum(parts.values()) or 1
    largest = sorted(parts.items(), key=lambda part: -part[1])[:2]
    words = ", ".join(f"{name} {100 * size / total:.0f} %" for name, size in largest if size)
    return shown.append(f" {words}", "default")


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Items with a progress bar on a terminal; a log gets a line every ten seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from progress.track(items, what, console=console, transient=True)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > PAUSE:
            said = time.monotonic()
            say(f"{what}: {done} of {len(items)}")
        yield item
