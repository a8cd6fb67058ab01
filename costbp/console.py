"""What commands print: messages on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


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
