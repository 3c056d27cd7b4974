from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from s2seg.sources import handles
from s2seg.sources.handles import Handles


class Dataset:
    def __init__(self, link: str) -> None:
        self.link, self.closed = link, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Dataset]:
    """All datasets that were opened, in order; to open one takes a while."""
    datasets: list[Dataset] = []

    def take_a_while(link: str) -> Dataset:
        time.sleep(0.01)
        datasets.append(Dataset(link))
        return datasets[-1]

    monkeypatch.setattr(handles.rasterio, "open", take_a_while)
    return datasets


def lend(pool: Handles, href: str, **options: bool) -> Dataset:
    with pool.lend(href, **options) as dataset:
        assert not dataset.closed
        return dataset


def in_another_thread(call: Callable[[], Dataset]) -> Dataset:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


def test_what_one_thread_has_opened_serves_the_next(opened: list[Dataset]) -> None:
    pool = Handles(idle=4)
    assert in_another_thread(lambda: lend(pool, "a")) is lend(pool, "a") is opened[0]
    with pool.lend("a") as first, pool.lend("a") as second:
        assert first is not second
    lend(pool, "a")
    assert len(opened) == 2


def test_a_file_is_opened_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    opening, most = [], []

    def rasterio_open(link: str) -> Dataset:
        opening.append(link)
        most.append(len(opening))
        time.sleep(0.005)
        opening.remove(link)
        return Dataset(link)

    monkeypatch.setattr(handles.rasterio, "open", rasterio_open)
    pool, together = Handles(idle=9), threading.Barrier(4)

    def read() -> None:
        together.wait()
        with pool.lend("a"):
            time.sleep(0.05)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and set(most) == {1}


def test_a_failure_closes_all_of_one_href(opened: list[Dataset]) -> None:
    pool = Handles(idle=9)
    with pool.lend("a"), pool.lend("a"), pool.lend("b"):
        pass
    with pytest.raises(OSError, match="expired"), pool.lend("a"):
        raise OSError("expired")
    assert [d.closed for d in opened] == [True, True, False]
    assert lend(pool, "a") is opened[3]


def test_anew_means_anew(opened: list[Dataset]) -> None:
    pool = Handles(idle=9)
    lend(pool, "a")
    assert lend(pool, "a", anew=True) is opened[1]


def test_links_are_signed_when_they_are_opened(opened: list[Dataset]) -> None:
    pool, tokens = Handles(idle=9), iter("12")
    for _ in range(2):
        with pool.lend("a", lambda href: href + next(tokens)):
            pass
    assert [d.link for d in opened] == ["a1"]


def test_the_longest_idle_are_closed_first(opened: list[Dataset]) -> None:
    pool = Handles(idle=2)
    for href in "abab":
        lend(pool, href)
    lend(pool, "a")
    lend(pool, "c")
    assert {d.link: d.closed for d in opened} == {"a": False, "b": True, "c": False}
    pool.clear()
    assert all(d.closed for d in opened)
