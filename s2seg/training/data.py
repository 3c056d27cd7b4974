"""From the chip store to the network: batches in a known order, read ahead by one thread."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch

from s2seg.errors import S2SegWarning
from s2seg.training.chips import ChipStore
from s2seg.training.sampling import DateMix, DatePlan, EpochPlan, Positions

Asked = TypeVar("Asked")
_Asked = TypeVar("_Asked", contravariant=True)
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (n, band, h, w) uint16 and labels (n, h, w) uint8, as they are stored."""

_AHEAD = 3  # batches: one in use, one ready, one being read


class Chips(Protocol[_Asked]):
    """What a feed reads from; :class:`s2seg.training.chips.ChipStore` is one, asked by positions."""

    def read(self, asked: _Asked, /) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """Stored numbers (n, band, h, w), and legend codes (n, h, w)."""


class MixedChips:
    """Chips with rectangles of other dates of the same places.

    A rectangle takes over what the other date has data of. Labels are those of the place, and pixels that the chip's
    own date lacks get theirs with their data.

    Parameters
    ----------
    chips
        Where the pixels are.
    """

    def __init__(self, chips: Chips[Positions]) -> None:
        self._chips = chips

    def read(self, mix: DateMix, /) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """Mix one batch."""
        n, mixed = len(mix.chips), np.flatnonzero(mix.others != mix.chips)
        images, labels = self._chips.read(np.concatenate([mix.chips, mix.others[mixed]]))
        images, labels = np.require(images, requirements="W"), np.require(labels, requirements="W")
        for chip, other in zip(mixed, range(n, n + len(mixed)), strict=True):
            where = _square(mix.squares[chip], labels.shape[1:]) & (images[other] != 0).all(axis=0)
            np.copyto(images[chip], images[other], where=where)
            np.copyto(labels[chip], labels[other], where=where)
        return images[:n], labels[:n]


def _square(square: npt.NDArray[np.float64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """(h, w) bool, from its centre and its side."""
    *centre, side = square
    down, across = (
        np.abs(np.arange(n) + 0.5 - middle * n) < side * n / 2 for n, middle in zip(shape, centre, strict=True)
    )
    return down[:, None] & across


def date_plan(chips: ChipStore, train: Positions, share: float, seed: int) -> DatePlan | None:
    """Plan how dates are mixed: among chips of one window of one area.

    Parameters
    ----------
    chips
        Where they are.
    train
        Indices of those that are mixed.
    share
        Of them, from 0 to 1.
    seed
        Of the draws.

    Returns
    -------
    DatePlan or None
        With positions in ``train``; None where nothing is to be mixed.

    Warns
    -----
    S2SegWarning
        If there is no chip of two dates.
    """
    if not share:
        return None
    area = np.unique(chips.area[train], return_inverse=True)[1]
    plan = DatePlan(np.column_stack([area, chips.size[train], chips.origin[train, 1:]]), share, seed)
    if plan.mixes:
        return plan
    warnings.warn(
        "augment.mixed_dates does nothing, since no chip is there at two dates: list several under areas.0.datetime",
        S2SegWarning,
        stacklevel=2,
    )
    return None


class Feed(Generic[Asked]):
    """The batches of one epoch after the other, as Lightning iterates over them.

    One thread reads ahead while the network is busy. What goes wrong in it is raised to whoever waits for the batch.

    Parameters
    ----------
    chips
        Where the pixels are.
    plan
        What to ask the chips for, for each batch of an epoch: a pure function of the epoch, with equally many batches
        for all epochs.
    epoch
        Tells the epoch at the moment when its first batch is asked for.
    """

    def __init__(self, chips: Chips[Asked], plan: Callable[[int], Sequence[Asked]], epoch: Callable[[], int]) -> None:
        self._chips, self._plan, self._epoch = chips, plan, epoch
        self._length = len(plan(0))
        self.waited = 0.0
        """Seconds that whoever iterates has waited for batches, all in all."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch."""
        todo = iter(self._plan(self._epoch()))
        pool = ThreadPoolExecutor(1, thread_name_prefix="s2seg-chips")
        try:
            ready = deque(pool.submit(self._read, asked) for asked in islice(todo, _AHEAD))
            while ready:
                started = time.perf_counter()
                batch = ready.popleft().result()
                self.waited += time.perf_counter() - started
                ready.extend(pool.submit(self._read, asked) for asked in islice(todo, 1))
                yield batch
        finally:  # also when the epoch is left in the middle
            pool.shutdown(cancel_futures=True)

    def _read(self, asked: Asked) -> Batch:
        images, labels = self._chips.read(asked)
        return _tensor(images), _tensor(labels)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    # torch warns of arrays that it must not write to; a store may hand out such views of its cache
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


class ChipData(pl.LightningDataModule):
    """The training and validation batches of one process.

    Parameters
    ----------
    chips
        Where the pixels are.
    train, validation
        Indices of the chips of each part.
    plan
        What the batches of an epoch are, as positions in ``train``. With several processes (DDP) each takes its share
        of every batch.
    dates
        Which of them get a rectangle of another date, if any do; positions in ``train`` as well.
    """

    def __init__(
        self,
        chips: Chips[Positions],
        train: Positions,
        validation: Positions,
        plan: EpochPlan,
        dates: DatePlan | None = None,
    ) -> None:
        super().__init__()
        self._chips, self._train, self._validation, self._plan, self._dates = chips, train, validation, plan, dates
        self._feed: Feed[Any] | None = None

    @property
    def waited(self) -> float:
        """Seconds that training has waited for batches so far."""
        return 0.0 if self._feed is None else self._feed.waited

    def train_dataloader(self) -> Feed[Any]:
        """Return the batches of every epoch."""
        rank, world = self._rank(), self._world()

        def chips(epoch: int) -> list[Positions]:
            return [self._train[batch][rank::world] for batch in self._plan.batches(epoch)]

        def mixes(epoch: int, dates: DatePlan) -> list[DateMix]:
            drawn = dates.draw(epoch, self._plan.batches(epoch))  # for all processes, so that their number is no matter
            return [mix.among(self._train).share(rank, world) for mix in drawn]

        def now() -> int:  # Lightning counts it up before anyone asks for the first batch
            return int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[union-attr]

        if self._dates is None:
            self._feed = Feed(self._chips, chips, now)
        else:
            self._feed = Feed(MixedChips(self._chips), partial(mixes, dates=self._dates), now)
        return self._feed

    def val_dataloader(self) -> Feed[Positions]:
        """Return the validation chips, each once and in order."""
        size = max(1, self._plan.batch_size // self._world())
        mine = self._validation[self._rank() :: self._world()]
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        return Feed(self._chips, lambda _: batches, lambda: 0)

    def _rank(self) -> int:
        return int(self.trainer.global_rank) if self.trainer else 0

    def _world(self) -> int:
        return int(self.trainer.world_size) if self.trainer else 1
