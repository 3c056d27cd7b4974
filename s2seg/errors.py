"""What can go wrong, as types that carry the data a caller needs to react.

Every class here is a user's or the data's mistake: the CLI prints it as one line and exits with 2. Anything else that
escapes is a bug of ours and keeps its traceback. All of them survive pickling, because they cross process borders.
"""

from __future__ import annotations

from collections.abc import Sequence


class S2SegError(Exception):
    """Base of every error that s2seg raises on purpose; ``str(error)`` is one line that says how to go on."""


class InputError(S2SegError):
    """An argument makes no sense: an area, a date range, a resolution, an unknown name."""


class NoItemsError(S2SegError):
    """A search found nothing usable; the text says what was asked and what the catalog holds instead."""


class MissingBandError(S2SegError):
    """A band that was asked for is in none (or only some) of the items.

    Parameters
    ----------
    band, item_id
        What is missing, and the first item that lacks it.
    available
        The bands that the item does have.
    """

    def __init__(self, band: str, item_id: str, available: Sequence[str]) -> None:
        super().__init__(band, item_id, tuple(available))
        self.band, self.item_id, self.available = band, item_id, tuple(available)

    def __str__(self) -> str:
        return (
            f"item {self.item_id} has no band {self.band!r}; it has {', '.join(self.available) or 'none'}. "
            "Choose another collection, or a model that does not need this band"
        )


class ReadError(S2SegError):
    """The pixels of one asset could not be read.

    Parameters
    ----------
    item_id, band, href
        Which asset.
    cause
        What the raster library said, in one line.
    """

    def __init__(self, item_id: str, band: str, href: str, cause: str) -> None:
        super().__init__(item_id, band, href, cause)
        self.item_id, self.band, self.href, self.cause = item_id, band, href, cause

    def __str__(self) -> str:
        return f"cannot read band {self.band} of item {self.item_id} ({self.href}): {self.cause}"


class ModelError(S2SegError):
    """A folder is not a usable model bundle, or a runtime cannot run it.

    Parameters
    ----------
    path
        The bundle's path or URL.
    reason
        What is wrong and how to mend it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"model {self.path}: {self.reason}"


class OutputError(S2SegError):
    """Results cannot be written.

    Parameters
    ----------
    path
        Where they should have gone.
    reason
        What is in the way and how to mend it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot write {self.path}: {self.reason}"


class S2SegWarning(UserWarning):
    """Something was mended or assumed on the way that a careful user wants to know of."""
