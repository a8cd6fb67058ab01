"""costbp: what forward-mode AD and zeroth-order training cost against checkpointed backpropagation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from costbp.own_loop import Method

__version__ = "0.1.0"


def method(name: str, **options: Any) -> Method:
    """A method of the catalog for a training loop of your own; ``costbp.own_loop.Method`` says what it
    takes. torch is imported only here."""
    from costbp.own_loop import Method

    return Method(name, **options)
