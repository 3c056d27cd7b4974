from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from s2seg.sources.shelf import Shelf


class Maker:
    """Makes words of numbers, and remembers which; ``bad`` ones fail."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.bad: set[int] = set()

    def __call__(self, keys: list[int]) -> Iterator[str]:
        for key in keys:
            if key in self.bad:
                raise ValueError(f"no {key}")
            self.made.append(key)
            yield str(key)


def test_each_is_made_once_and_comes_in_the_order_asked_for() -> None:
    shelf, make = Shelf[int, str](10), Maker()
    assert shelf.get([1, 2], make) == ["1", "2"]
    assert shelf.get([3, 2, 1], make) == ["3", "2", "1"]
    assert make.made == [1, 2, 3]
    shelf.clear()
    assert shelf.get([1], make) == ["1"] and make.made == [1, 2, 3, 1]


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    shelf, make = Shelf[int, str](3), Maker()
    shelf.get([1, 2, 3], make)
    shelf.get([1], make)
    shelf.get([4], make)  # in the place of 2
    shelf.put_last([3])
    shelf.get([5], make)  # in the place of 3
    shelf.get([1, 4, 5], make)
    assert make.made == [1, 2, 3, 4, 5]
    assert shelf.get([2, 3], make) == ["2", "3"] and make.made[5:] == [2, 3]


def test_room_is_a_weight_and_what_is_too_heavy_is_handed_out_and_not_kept() -> None:
    shelf, make = Shelf[int, str](4, weigh=len), Maker()
    assert shelf.get([10, 20, 12345], make) == ["10", "20", "12345"]
    shelf.get([10, 20], make)
    assert make.made == [10, 20, 12345, 10, 20]


def test_a_failure_is_that_of_all_who_wait_and_is_not_kept() -> None:
    shelf, make, begun, go_on = Shelf[int, str](9), Maker(), threading.Event(), threading.Event()
    make.bad = {2}

    def slowly(keys: list[int]) -> Iterator[str]:
        begun.set()
        go_on.wait(5)
        return make(keys)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shelf.get, [1, 2, 3], slowly)
        begun.wait(5)
        second = pool.submit(shelf.get, [3], make)
        go_on.set()
        for read in (first, second):
            with pytest.raises(ValueError, match="no 2"):
                read.result(5)
    make.bad = set()
    assert shelf.get([1, 2, 3], make) == ["1", "2", "3"]
    assert make.made == [1, 2, 3]  # the first had been made before the second failed


def test_a_thread_makes_its_own_while_others_make_theirs() -> None:
    shelf, make, both = Shelf[int, str](9), Maker(), threading.Barrier(2)

    def together(keys: list[int]) -> Iterator[str]:
        both.wait(5)  # lets nobody pass until two are making
        return make(keys)

    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(shelf.get, [0, own], together) for own in (1, 2)]
        assert [read.result(9) for read in reads] == [["0", "1"], ["0", "2"]]
    assert sorted(make.made) == [0, 1, 2]
