"""Open datasets, shared by all threads of the process: lent to one reader at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import rasterio


class Handles:
    """Datasets that stay open between reads, because to open one from afar takes two requests.

    A GDAL handle serves one thread at a time, but any thread: one that another has opened, with the blocks that it has
    decoded, is lent before a new one is opened. As many are open of a file as have read it at once.

    Parameters
    ----------
    idle
        How many may wait to be lent; beyond it, one of the file that was read longest ago is closed.
    """

    def __init__(self, idle: int) -> None:
        self._limit, self._count = idle, 0
        self._idle: OrderedDict[str, list[rasterio.DatasetReader]] = OrderedDict()
        self._gates: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()

    @contextmanager
    def lend(
        self, href: str, sign: Callable[[str], str] | None = None, *, anew: bool = False
    ) -> Iterator[rasterio.DatasetReader]:
        """Lend an open dataset. When the reader fails it is closed, and so is what waits of the same href.

        Parameters
        ----------
        href
            Path or URL, unsigned: it names the dataset.
        sign
            Makes of the href what is opened.
        anew
            Open another one, whatever waits: after a failure, as a link that has expired has done so for all.
        """
        dataset = None if anew else self._take(href)
        if dataset is None:
            dataset = self._open(href, sign, anew)
        try:
            yield dataset
        except BaseException:
            dataset.close()
            self._drop(href)
            raise
        self._give_back(href, dataset)

    def clear(self) -> None:
        """Close all that wait: files that have been replaced are opened again, and nothing is left decoded."""
        for href in list(self._idle):
            self._drop(href)

    def _take(self, href: str) -> rasterio.DatasetReader | None:
        with self._lock:
            waiting = self._idle.get(href)
            if not waiting:
                return None
            self._count -= 1
            dataset = waiting.pop()
            if not waiting:
                del self._idle[href]
            return dataset

    def _open(self, href: str, sign: Callable[[str], str] | None, anew: bool) -> rasterio.DatasetReader:
        with self._lock:
            gate = self._gates.setdefault(href, threading.Lock())
        # one at a time: GDAL answers the next open of this file from what it remembers of the first, without a request
        with gate:
            waiting = None if anew else self._take(href)
            return waiting or rasterio.open(sign(href) if sign else href)

    def _give_back(self, href: str, dataset: rasterio.DatasetReader) -> None:
        with self._lock:
            self._idle.setdefault(href, []).append(dataset)
            self._idle.move_to_end(href)
            self._count += 1
            oldest = next(iter(self._idle)) if self._count > self._limit else None
        if oldest is not None and (surplus := self._take(oldest)):
            surplus.close()

    def _drop(self, href: str) -> None:
        while dataset := self._take(href):
            dataset.close()
