"""Whether a file is still the one that was read."""

from __future__ import annotations

from pathlib import Path


def stamp(href: str) -> tuple[int, int] | None:
    """Tell the time of the last change, in nanoseconds, and the size in bytes; None for what is not a local file.

    What is remembered of a file is remembered under its path and its stamp.
    """
    try:
        found = Path(href).stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size
