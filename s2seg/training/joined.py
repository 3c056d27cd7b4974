"""Two chip stores as one: training chips of one size, and validation chips on which all sizes are compared."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from s2seg.training.chips import ChipStore, Images, Labels
from s2seg.training.splits import PARTS

_TRAIN, _VALIDATION = (PARTS.index(part) + 1 for part in ("train", "validation"))


class JoinedChips(ChipStore):
    """The training chips of one store, then the validation chips of another; neither's test part is there.

    Parameters
    ----------
    train
        Also gives what the store as a whole has: scaling, bands, spec, fingerprint.
    validation
        Of the same places, split and bands; its chips may be of another size.
    """

    def __init__(self, train: ChipStore, validation: ChipStore) -> None:
        self._stores = train, validation
        self._kept = tuple(
            np.flatnonzero(store.part == part) for store, part in ((train, _TRAIN), (validation, _VALIDATION))
        )
        self.path, self.legend, self.bands, self.spec = train.path, train.legend, train.bands, train.spec
        self.fingerprint, self.mean, self.std, self.items = train.fingerprint, train.mean, train.std, train.items
        kept = list(zip(self._stores, self._kept, strict=True))
        for name in ("origin", "size", "part", "histogram", "area", "date"):
            setattr(self, name, np.concatenate([getattr(store, name)[indices] for store, indices in kept]))

    def __len__(self) -> int:
        return len(self.part)

    def __reduce__(self) -> Any:
        return JoinedChips, self._stores

    def images(self, indices: int | slice | npt.ArrayLike) -> Images:
        """As of a `ChipStore`; the indices are all of one part, since the sizes differ."""
        store, inner = self._inside(indices)
        return store.images(inner)

    def labels(self, indices: int | slice | npt.ArrayLike) -> Labels:
        """As of a `ChipStore`; the indices are all of one part, since the sizes differ."""
        store, inner = self._inside(indices)
        return store.labels(inner)

    def read(self, indices: int | slice | npt.ArrayLike) -> tuple[Images, Labels]:
        """Both, as of a `ChipStore`; the indices are all of one part, since the sizes differ."""
        store, inner = self._inside(indices)
        return store.read(inner)

    def _inside(self, indices: int | slice | npt.ArrayLike) -> tuple[ChipStore, npt.NDArray[np.int64]]:
        """The store that holds these chips, and their indices there."""
        asked = np.atleast_1d(np.arange(len(self))[cast(Any, indices)])
        before = len(self._kept[0])
        if (asked < before).all():
            return self._stores[0], self._kept[0][asked]
        return self._stores[1], self._kept[1][asked - before]
