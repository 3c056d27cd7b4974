import threading
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pytest

from s2seg.training.data import ChipData, Feed
from s2seg.training.sampling import EpochPlan


@dataclass
class FakeChips:
    """Chips that hold their own index, and remember who read what."""

    broken: int = -1
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def read(self, indices):
        if self.broken in indices:
            raise ValueError(f"chip {self.broken} is broken")
        assert threading.current_thread() is not threading.main_thread()
        self.asked.append(tuple(indices))
        image = np.broadcast_to(np.asarray(indices, np.uint16)[:, None, None, None], (len(indices), 2, 4, 4))
        image.flags.writeable = False
        return image, np.zeros((len(indices), 4, 4), np.uint8)


def numbers(batches):
    return [images[:, 0, 0, 0].tolist() for images, _ in batches]


def test_batches_come_in_the_planned_order_of_each_epoch():
    chips, epoch = FakeChips(), iter([0, 1])
    plan = {0: [np.array([i, 10 + i]) for i in range(7)], 1: [np.array([3, 4])] * 7}
    feed = Feed(chips, plan.__getitem__, lambda: next(epoch))
    assert len(feed) == 7
    for expected in plan.values():
        assert numbers(feed) == [batch.tolist() for batch in expected]
    assert feed.waited > 0


def test_the_epoch_is_asked_for_when_the_first_batch_is():
    epoch = 0
    feed = Feed(FakeChips(), lambda e: [np.array([e])], lambda: epoch)
    batches = iter(feed)
    epoch = 5
    assert numbers(batches) == [[5]]


def test_no_more_than_a_few_batches_are_read_ahead():
    chips = FakeChips()
    batches = iter(Feed(chips, lambda _: [np.array([i]) for i in range(20)], lambda: 0))
    next(batches)
    batches.close()
    assert len(chips.asked) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("s2seg-chips")]


def test_a_failed_read_reaches_whoever_waits():
    batches = iter(Feed(FakeChips(broken=2), lambda _: [np.array([i]) for i in range(9)], lambda: 0))
    assert [next(batches)[0][0, 0, 0, 0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="chip 2 is broken"):
        next(batches)


def test_processes_share_every_batch(monkeypatch):
    chips, plan = FakeChips(), EpochPlan(20, 4, seed=3)
    train, validation = np.arange(100, 120), np.arange(7)

    def of(rank, world):
        data = ChipData(chips, train, validation, plan)
        monkeypatch.setattr(data, "_rank", lambda: rank)
        monkeypatch.setattr(data, "_world", lambda: world)
        return numbers(data.val_dataloader()), [b.tolist() for b in data.train_dataloader()._plan(1)]

    alone, both = of(0, 1), (of(0, 2), of(1, 2))
    assert alone[0] == [[0, 1, 2, 3], [4, 5, 6]]
    assert sorted(chain(*both[0][0], *both[1][0])) == list(range(7))
    for whole, first, second in zip(alone[1], both[0][1], both[1][1], strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(whole)
        assert min(whole) >= 100
