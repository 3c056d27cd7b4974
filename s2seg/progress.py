"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done, and the total."""
Steps = Callable[[int, int], None]
"""Called with what is done of one stage, and the total."""


def silent(*_: object) -> None:
    """Report to nobody."""
