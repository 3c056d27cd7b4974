"""From a catalog's documents to items, with an account of those that are broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pystac

from s2seg.sources.catalogs import CatalogError
from s2seg.sources.item_checks import ItemError, leave_out, parse_item


@dataclass
class Intake:
    """Parses the items of one catalog, and goes on after a broken one.

    Parameters
    ----------
    url
        The catalog.
    """

    url: str
    sound: bool = field(default=False, init=False)
    broken: dict[str, str] = field(default_factory=dict, init=False)

    def items(self, documents: Iterable[Any]) -> Iterator[pystac.Item]:
        """Yield the sound items of documents that say themselves where they live."""
        for document in documents:
            if item := self.item(document):
                yield item

    def item(self, document: Any, href: str | None = None) -> pystac.Item | None:
        """Parse one item, from ``href``; None if it is broken."""
        try:
            item = parse_item(document, href)
        except ItemError as error:
            self.refuse(error.item_id, error.reason)
            return None
        self.sound = True
        return item

    def refuse(self, name: str, reason: str) -> None:
        """Note that an item is broken."""
        self.broken[name] = reason

    def report(self) -> None:
        """Warn of the items that were left out so far.

        Raises
        ------
        CatalogError
            If all were.
        """
        if self.broken and not self.sound:
            name, reason = next(iter(self.broken.items()))
            raise CatalogError(self.url, f"none of its items can be used; item {name}: {reason}")
        leave_out(self.broken)
