"""Keep what takes long to make, for all threads of the process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Shelf(Generic[K, V]):
    """Things by key: each is made once, however many threads ask; what was asked for longest ago goes first.

    Parameters
    ----------
    room
        Weight of all that stay.
    weigh
        Weight of one thing; by default they are counted.
    """

    def __init__(self, room: float, weigh: Callable[[V], float] = lambda _: 1) -> None:
        self._room, self._weigh, self._held = room, weigh, 0.0
        self._things: OrderedDict[K, Future[V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Sequence[K], make: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """Take things from the shelf; those that nobody has made or is making are made together.

        Parameters
        ----------
        keys
            What is wanted.
        make
            Makes those of the keys that it is given, in order. What it raises is raised by all who wait for them, and
            they are made anew when they are next asked for.
        """
        with self._lock:
            own = {key: Future[V]() for key in keys if key not in self._things}
            self._things |= own
            for key in keys:
                self._things.move_to_end(key)
            wanted = [self._things[key] for key in keys]
        if own:  # while others make the rest
            self._make(own, make)
        return [thing.result() for thing in wanted]

    def put_last(self, keys: Iterable[K]) -> None:
        """Let these go before all others when there is no room: nobody is likely to ask for them again."""
        with self._lock:
            for key in keys:
                if key in self._things:
                    self._things.move_to_end(key, last=False)

    def clear(self) -> None:
        """Take all away that is made."""
        with self._lock:
            for key in list(self._things):
                self._take_off(key)

    def _make(self, own: dict[K, Future[V]], make: Callable[[list[K]], Iterable[V]]) -> None:
        try:
            for thing, value in zip(own.values(), make(list(own)), strict=True):
                self._put(thing, value)
        except BaseException as error:
            with self._lock:
                for key, thing in own.items():
                    if not thing.done():
                        del self._things[key]
                        thing.set_exception(error)
            raise

    def _put(self, thing: Future[V], value: V) -> None:
        with self._lock:
            thing.set_result(value)
            self._held += self._weigh(value)
            for oldest in list(self._things) if self._held > self._room else ():
                self._take_off(oldest)
                if self._held <= self._room:
                    break

    def _take_off(self, key: K) -> None:
        thing = self._things.get(key)
        if thing is not None and thing.done():
            del self._things[key]
            self._held -= self._weigh(thing.result())
