from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from affine import Affine
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources import ahead
from s2seg.sources.ahead import AHEAD, AssetReader, places
from s2seg.sources.reader import AssetRef

SPEC = SimpleNamespace(epsg=32633, transform=Affine(10, 0, 0, 0, -10, 0))
WINDOW, NEXT = Window(0, 0, 8, 8), Window(8, 0, 8, 8)
HERE, AWAY = (0, -160, 160, 0), (10_000, -160, 10_160, 0)


def readers(count: int, root: str = "https://x.test/", away: tuple[int, ...] = ()) -> list[AssetReader]:
    refs = [AssetRef(f"item{i}", "red", f"{root}{i}.tif") for i in range(count)]
    bounds = [AWAY if i in away else HERE for i in range(count)]
    return [AssetReader(url=place, spec=SPEC) for place in places(refs, bounds)]


class Reads:
    """Stands in for read_window; the pixels are the asset's number, and no read ends before ``together`` lets it."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, Window]] = []
        self.threads: set[str] = set()
        self.bad: set[int] = set()
        self.together = threading.Barrier(1)

    def __call__(self, ref: AssetRef, epsg: int, transform: Affine, window: Window) -> np.ndarray:
        number = int(ref.item_id.removeprefix("item"))
        self.begun.append((number, window))
        self.threads.add(threading.current_thread().name)
        self.together.wait(5)
        if number in self.bad:
            raise ReadError(ref.item_id, ref.band, ref.href, "gone")
        return np.full((int(window.height), int(window.width)), number, np.uint16)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    stand_in = Reads()
    monkeypatch.setattr(ahead, "read_window", stand_in)
    return stand_in


def numbers(some: list[AssetReader], window: Window = WINDOW) -> list[int]:
    """Read as stackstac does."""
    return [int(reader.read(window)[0, 0]) for reader in some]


def test_assets_of_a_chunk_are_read_side_by_side_and_come_in_order(reads: Reads) -> None:
    reads.together = threading.Barrier(AHEAD)  # which lets nobody pass until so many wait
    assert numbers(readers(2 * AHEAD)) == list(range(2 * AHEAD))
    assert len(reads.begun) == 2 * AHEAD


def test_no_more_than_a_few_are_begun_before_they_are_asked_for(reads: Reads) -> None:
    some = readers(4 * AHEAD)
    for asked, reader in enumerate(some, 1):
        reader.read(WINDOW)
        assert len(reads.begun) <= asked + AHEAD


def test_only_what_overlaps_the_chunk_is_begun(reads: Reads) -> None:
    some = readers(6, away=(1, 4))
    assert numbers([some[i] for i in (0, 2, 3, 5)]) == [0, 2, 3, 5]
    assert sorted(number for number, _ in reads.begun) == [0, 2, 3, 5]


def test_each_chunk_is_read_for_itself_and_again_when_it_is_asked_for_again(reads: Reads) -> None:
    some = readers(3)
    for window in (WINDOW, NEXT, WINDOW, WINDOW):
        assert numbers(some, window) == [0, 1, 2]
    assert [sum(w == window for _, w in reads.begun) for window in (WINDOW, NEXT)] == [9, 3]
    assert numbers([some[2], some[0]]) == [2, 0]  # in an order that was not foreseen


def test_a_failure_is_that_of_the_asset_and_the_next_chunk_is_read(reads: Reads) -> None:
    some, reads.bad = readers(5), {2}
    assert numbers(some[:2]) == [0, 1]
    with pytest.raises(ReadError, match="item2"):
        some[2].read(WINDOW)
    reads.bad = set()
    assert numbers(some, NEXT) == [0, 1, 2, 3, 4]


def test_local_files_are_read_when_they_are_asked_for(reads: Reads) -> None:
    some = readers(3, root="/data/")
    some[1].read(WINDOW)
    assert reads.begun == [(1, WINDOW)] and reads.threads == {threading.current_thread().name}


def test_a_batch_travels_once() -> None:
    one, many = (len(pickle.dumps([reader.place for reader in readers(n)])) for n in (100, 200))
    assert many < 2.5 * one
