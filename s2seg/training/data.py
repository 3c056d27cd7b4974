"""From the chip store to the network: batches in a known order, read ahead by one thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch

from s2seg.training.sampling import EpochPlan

Positions = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (n, band, h, w) uint16 and labels (n, h, w) uint8, as they are stored."""

_AHEAD = 3  # batches: one in use, one ready, one being read


class Chips(Protocol):
    """What a feed reads from; :class:`s2seg.training.chips.ChipStore` is one."""

    def read(self, indices: Positions) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """Stored numbers (n, band, h, w), and legend codes (n, h, w)."""


class Feed:
    """The batches of one epoch after the other, as Lightning iterates over them.

    One thread reads ahead while the network is busy. What goes wrong in it is raised to whoever waits for the batch.

    Parameters
    ----------
    chips
        Where the pixels are.
    plan
        Indices of the chips in each batch of an epoch: a pure function of the epoch, with equally many batches for
        all epochs.
    epoch
        Tells the epoch at the moment when its first batch is asked for.
    """

    def __init__(self, chips: Chips, plan: Callable[[int], Sequence[Positions]], epoch: Callable[[], int]) -> None:
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
            ready = deque(pool.submit(self._read, indices) for indices in islice(todo, _AHEAD))
            while ready:
                started = time.perf_counter()
                batch = ready.popleft().result()
                self.waited += time.perf_counter() - started
                ready.extend(pool.submit(self._read, indices) for indices in islice(todo, 1))
                yield batch
        finally:  # also when the epoch is left in the middle
            pool.shutdown(cancel_futures=True)

    def _read(self, indices: Positions) -> Batch:
        images, labels = self._chips.read(indices)
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
    """

    def __init__(self, chips: Chips, train: Positions, validation: Positions, plan: EpochPlan) -> None:
        super().__init__()
        self._chips, self._train, self._validation, self._plan = chips, train, validation, plan
        self._feed: Feed | None = None

    @property
    def waited(self) -> float:
        """Seconds that training has waited for batches so far."""
        return 0.0 if self._feed is None else self._feed.waited

    def train_dataloader(self) -> Feed:
        """Return the batches of every epoch."""
        mine = slice(self._rank(), None, self._world())
        self._feed = Feed(
            self._chips,
            lambda epoch: [self._train[batch][mine] for batch in self._plan.batches(epoch)],
            # Lightning counts it up before anyone asks for the first batch
            lambda: int(self.trainer.fit_loop.epoch_progress.current.processed),  # type: ignore[union-attr]
        )
        return self._feed

    def val_dataloader(self) -> Feed:
        """Return the validation chips, each once and in order."""
        size = max(1, self._plan.batch_size // self._world())
        mine = self._validation[self._rank() :: self._world()]
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        return Feed(self._chips, lambda _: batches, lambda: 0)

    def _rank(self) -> int:
        return int(self.trainer.global_rank) if self.trainer else 0

    def _world(self) -> int:
        return int(self.trainer.world_size) if self.trainer else 1
