"""The one exception a user is meant to see, and the nearest-match hint it often carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 590  # characters of a message


class UserError(Exception):
    """A mistake the user can mend. The CLI prints its text as one line and exits with ``code``."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(one_line(message))
        self.code = code


def one_line(text: str) -> str:
    """``text`` in one line of at most ``LONGEST`` characters, what can't be printed as an escape; a
    longer one keeps its ends."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 205]} ... {text[-200:]}"
    return text


def suggest(value: object, allowed: Iterable[str]) -> str:
    """``allowed: a, b, c; did you mean 'b'?`` - the second half only where something is near."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"allowed: {', '.join(names)}{hint}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
