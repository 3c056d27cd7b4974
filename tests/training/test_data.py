import threading
import warnings
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pytest

from s2seg.errors import S2SegWarning
from s2seg.training.chips import ChipSpec, write_chips
from s2seg.training.data import ChipData, Feed, MixedChips, date_plan
from s2seg.training.fit import fit
from s2seg.training.sampling import DateMix, EpochPlan
from tests.training.conftest import make_area
from tests.training.toy import LEGEND, toy_config


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


# -- dates ------------------------------------------------------------------------------------------------------------


def stored(path, dates=2):
    """Chips of a place at several dates: 1000 more in all bands at each; a hole in the first rows of the second."""
    rng = np.random.default_rng(0)
    labels = np.array(LEGEND.codes, np.uint8)[rng.integers(0, 3, (12, 12)).repeat(8, 0).repeat(8, 1)]
    split = np.ones((96, 96), np.uint8)
    split[:, 64:] = 2
    images = [np.full((2, 96, 96), 1000 * (i + 1), np.uint16) for i in range(dates)]
    images[-1][:, :8] = 0
    first = make_area(image=images[0], labels=labels, split=split)
    others = [
        replace(make_area(image=image), labels=first.labels, split=first.split, date=str(i))
        for i, image in enumerate(images[1:])
    ]
    return write_chips([first, *others], path, LEGEND, ChipSpec(32, 32), fingerprint="toy", bands=("red", "nir"))


def test_a_rectangle_is_of_the_other_date_where_that_has_data(tmp_path):
    chips = stored(tmp_path / "chips")
    (clear,) = np.flatnonzero((chips.origin[:, :2] == 0).all(1) & (chips.origin[:, 2] == 0) & (chips.part == 1))
    (holed,) = np.flatnonzero((chips.origin == [1, 0, 0]).all(1) & (chips.part == 1))
    square = np.array([[0.25, 0.5, 0.5]] * 3)  # rows 0 to 15, columns 8 to 23
    mix = DateMix(np.array([clear, holed, clear]), np.array([holed, clear, clear]), square)
    images, labels = MixedChips(chips).read(mix)
    expected, codes = chips.read(mix.chips)
    expected[0, :, 8:16, 8:24] = 2000  # above is the hole
    expected[1, :, :16, 8:24] = 1000
    codes[1, :8, 8:24] = codes[0, :8, 8:24]  # the hole has data now, and so it has labels
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, codes)


def test_training_mixes_dates_and_resumes_to_the_bit(tmp_path):
    chips = stored(tmp_path / "chips", dates=3)

    def weights(name, share, **options):
        config = toy_config(augment={"mixed_dates": share}, fit={"epochs": 2, "steps_per_epoch": 2})
        state = fit(config, chips, tmp_path / name, **options).network.state_dict()
        return [values.tolist() for values in state.values()]

    def stop(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    mixed = weights("a", 0.7)
    assert mixed != weights("b", 0.0)
    with pytest.raises(KeyboardInterrupt):
        weights("c", 0.7, on_progress=stop)
    assert mixed == weights("c", 0.7, resume=True)


def test_processes_share_a_mix(tmp_path, monkeypatch):
    chips = stored(tmp_path / "chips")
    train = chips.indices("train")
    dates = date_plan(chips, train, 1.0, 0)

    def of(rank, world):
        data = ChipData(chips, train, chips.indices("validation"), EpochPlan(len(train), 4), dates)
        monkeypatch.setattr(data, "_rank", lambda: rank)
        monkeypatch.setattr(data, "_world", lambda: world)
        return data.train_dataloader()._plan(1)

    for whole, *halves in zip(of(0, 1), of(0, 2), of(1, 2), strict=True):
        for rank, half in enumerate(halves):
            np.testing.assert_array_equal(half.others, whole.others[rank::2])
        assert (whole.others != whole.chips).all()
        np.testing.assert_array_equal(chips.origin[whole.others, 1:], chips.origin[whole.chips, 1:])
        assert (chips.date[whole.others] != chips.date[whole.chips]).all()


def test_one_date_cannot_be_mixed(tmp_path):
    chips = stored(tmp_path / "chips", dates=1)
    train = chips.indices("train")
    with pytest.warns(S2SegWarning, match="mixed_dates does nothing"):
        assert date_plan(chips, train, 0.5, 0) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert date_plan(chips, train, 0.0, 0) is None
