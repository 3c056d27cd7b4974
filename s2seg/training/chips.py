"""The chip store: samples for training as a Zarr group, written once, read fast.

Pixels are stored as they are. Compression saves a third of the bytes of real scenes, and decoding costs more than it
saves when chips come in random order: whole shards are mapped into memory, and a chip is one copy.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import zarr

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.outputs._files import check_writable, replacing, writing
from s2seg.progress import Steps
from s2seg.training.cutting import Place, Planes, Window, blocks_of, cut, dates_together
from s2seg.training.shards import ShardedPixels
from s2seg.training.splits import PARTS

Images = npt.NDArray[np.uint16]
Labels = npt.NDArray[np.uint8]
Keep = Callable[[Images, Labels], bool]

_FORMAT = 2
_TRAIN = PARTS.index("train") + 1
_SHARD_BYTES = 16 * 2**20  # of one file
_STORED_BEHIND = 3  # batches of chips, of one block and at most a file, that wait to be stored or are
_PIXELS = {"image", "label"}
_TABLES = {"origin": np.int32, "size": np.int32, "part": np.uint8, "histogram": np.int64}


@dataclass(frozen=True)
class ChipSpec:
    """How an area is cut into chips, and which are worth keeping.

    Parameters
    ----------
    size
        Pixels on a side of a stored chip.
    stride
        Pixels from one chip to the next; less than ``size`` overlaps them.
    sizes
        More window sizes, in pixels of the scene, each resampled to ``size``: a larger one shows more context at a
        coarser scale, a smaller one is magnified. Their strides grow and shrink with them.
    min_labelled
        Least fraction of a chip's pixels that must have a label of the chip's part.
    max_nodata
        Greatest fraction without data: clouds that no date sees through, the edge of a swath.
    drop_only
        Codes: a chip with no other class than these is left out.

    Raises
    ------
    InputError
        For numbers out of range.

    Notes
    -----
    Both fractions are of the pixels inside the area; a chip that is padded because the area is smaller is not blamed
    for its padding.
    """

    size: int = 128
    stride: int = 64
    sizes: tuple[int, ...] = ()
    min_labelled: float = 0.1
    max_nodata: float = 0.5
    drop_only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.size, *self.sizes, self.size) < 1 or not 1 <= self.stride <= self.size:
            raise InputError(
                f"chips of {self.size} pixels every {self.stride} make no sense: the sizes must be positive, "
                "and the stride from 1 to the size, so that nothing is skipped"
            )
        for name in ("min_labelled", "max_nodata"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, not {value:g}")

    @property
    def windows(self) -> list[tuple[int, int]]:
        """(window, stride) for every size, the stored one first; each covers an area equally often."""
        sizes = dict.fromkeys((self.size, *self.sizes))
        return [(size, max(1, round(self.stride * size / self.size))) for size in sizes]


class ChipStore:
    """Chips on disk, numbered by place: in an order that does not depend on how the scenes were cut into blocks.

    :func:`write_chips` writes a store, :func:`open_chips` opens it for a configuration. A chip belongs to one part of
    the split; its label holds that part's pixels and nodata elsewhere, so that a window across a border gives no part
    a look at another's labels.

    Parameters
    ----------
    path
        The Zarr group.

    Attributes
    ----------
    origin
        (n, 3) int32: index of the region, row and column of the window's first pixel.
    size
        (n,) int32: pixels of the scene on a side of the window.
    part
        (n,) uint8: index in :data:`~s2seg.training.splits.PARTS` plus 1.
    area, date
        (n,) str: the region's name and date.
    histogram
        (n, class) int64: labelled pixels of each class, in channel order.
    mean, std
        (band,) float64 reflectance, over the valid pixels of the training chips.
    bands, items
        Names of the bands; ids of all source items.
    legend, spec, fingerprint
        What the store was made with.

    Raises
    ------
    InputError
        If there is no chip store at ``path``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._group, about = _open(self.path)
        self._pixels = {name: ShardedPixels(self.path, _array(self._group, name)) for name in _PIXELS & {*self._group}}
        self.fingerprint: str = about["fingerprint"]
        self.legend = Legend.from_dict(about["legend"], where=str(path))
        self.bands: tuple[str, ...] = tuple(about["bands"])
        spec = about["spec"]
        self.spec = ChipSpec(**spec | {k: tuple(spec[k]) for k in ("sizes", "drop_only")})
        self.mean = np.array(about["mean"])
        self.std = np.array(about["std"])
        self.items: tuple[str, ...] = tuple(dict.fromkeys(i for r in about["regions"] for i in r["items"]))
        origin, size, part, histogram = (_values(self._group, name) for name in _TABLES)
        # chips lie in the order in which blocks were read; they are counted by place
        order = np.lexsort((part, origin[:, 2], origin[:, 1], size, origin[:, 0]))
        self._order: npt.NDArray[np.int64] = order
        self.origin, self.size, self.part, self.histogram = origin[order], size[order], part[order], histogram[order]
        self.area, self.date = (
            np.array([r[key] for r in about["regions"]])[self.origin[:, 0]] for key in ("name", "date")
        )

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(self.indices(p))} {p}" for p in PARTS)
        return f"ChipStore({str(self.path)!r}: {parts}; {len(self.bands)} bands, {self.spec.size} px)"

    def __reduce__(self) -> tuple[type[ChipStore], tuple[Path]]:
        return ChipStore, (self.path,)

    def indices(self, part: str) -> npt.NDArray[np.int64]:
        """Chips of ``"train"``, ``"validation"`` or ``"test"``, as indices for the rest."""
        return np.flatnonzero(self.part == PARTS.index(part) + 1)

    @property
    def has_pixels(self) -> bool:
        """Whether pixels are in the store; where not, :class:`~s2seg.training.streaming.StreamedChips` reads them."""
        return self._pixels.keys() == _PIXELS

    def images(self, indices: int | slice | npt.ArrayLike) -> Images:
        """(n, band, size, size) uint16 DN, 0 is nodata; a single index gives n = 1."""
        return self._stored("image", indices)

    def labels(self, indices: int | slice | npt.ArrayLike) -> Labels:
        """(n, size, size) uint8 legend codes."""
        return self._stored("label", indices)

    def read(self, indices: int | slice | npt.ArrayLike) -> tuple[Images, Labels]:
        """Images and labels, as above."""
        return self.images(indices), self.labels(indices)

    def _stored(self, name: str, indices: int | slice | npt.ArrayLike) -> npt.NDArray[Any]:
        if not self.has_pixels:
            raise InputError(
                f"the chips in {self.path} were chosen with chips.store: false, and without a configuration their "
                "pixels cannot be found; cut them with chips.store: true"
            )
        return self._pixels[name].read(np.atleast_1d(self._order[cast(Any, indices)]))


def holds_chips(path: str | Path, fingerprint: str) -> bool:
    """Whether a chip store that can be read stands at ``path``, made from the configuration with this fingerprint."""
    try:
        return ChipStore(path).fingerprint == fingerprint
    except InputError:
        return False


def open_chips(path: str | Path, fingerprint: str | None = None) -> ChipStore:
    """Open a chip store.

    Parameters
    ----------
    path
        What :func:`write_chips` wrote.
    fingerprint
        Of the configuration that the caller is about to use; None takes any store.

    Raises
    ------
    InputError
        If there is no chip store, or it was made from another configuration.
    """
    store = ChipStore(path)
    if fingerprint is not None and store.fingerprint != fingerprint:
        raise InputError(
            f"the chips in {path} were made from another configuration: delete them, or where s2seg train cut them "
            "pass --overwrite to make them anew"
        )
    return store


def write_chips(
    regions: Sequence[Place],
    path: str | Path,
    legend: Legend,
    spec: ChipSpec,
    *,
    fingerprint: str,
    bands: Sequence[str],
    pixels: bool = True,
    keep: Keep | None = None,
    overwrite: bool = False,
    on_progress: Steps | None = None,
) -> ChipStore:
    """Cut regions into chips, filter them, and store them.

    Every block of a scene is computed once, several at a time, whatever the overlap of the chips; memory does not grow
    with the area. A window is stored once for each part of the split in which its labels pass the filters.

    Parameters
    ----------
    regions
        Scenes with labels and split. Dates of one area are regions of their own.
    path
        A folder; it appears under this name when it is complete.
    legend
        Of the labels.
    spec
        Sizes and filters.
    fingerprint
        Of the configuration; :func:`open_chips` compares it.
    bands
        Names of the scenes' bands.
    pixels
        Store them, too, and not only which chips there are and what is in them.
    keep
        Called with (band, size, size) uint16 and (size, size) uint8 of each chip that passed the filters; False leaves
        it out.
    overwrite
        Replace what stands at ``path``.
    on_progress
        Called with (done, total) blocks.

    Returns
    -------
    ChipStore
        The store, opened.

    Raises
    ------
    InputError
        If no chip passes, or none for training; if labels hold codes that the legend does not know; if a scene has
        other bands.
    OutputError
        If the path exists, or cannot be written; nothing is left behind.
    """
    path = check_writable(path, overwrite=overwrite, store=True)
    for region in regions:
        if region.scene.sizes["band"] != len(bands):
            raise InputError(f"{region.name} has {region.scene.sizes['band']} bands, not {len(bands)}")
    with replacing(path) as partial:
        tally = _Tally()
        with closing(_Writer(partial, path, len(bands), spec.size, legend, pixels)) as writer:
            for chips in _select(regions, legend, spec, keep, tally, on_progress):
                writer.add(chips)
            tally.check(writer)
            writer.finish(
                {
                    "fingerprint": fingerprint,
                    "legend": legend.to_dict(),
                    "bands": list(bands),
                    "spec": asdict(spec),
                    "regions": [describe(region) for region in regions],
                }
            )
    return ChipStore(path)


def describe(region: Place) -> dict[str, Any]:
    """What a chip store keeps of a region: ``name``, ``date``, ``items``."""
    return {"name": region.name, "date": region.date, "items": list(region.items)}


# -- choosing ---------------------------------------------------------------------------------------------------------


class _Chip(NamedTuple):
    image: Images
    label: Labels
    origin: tuple[int, int, int]
    size: int
    part: int
    histogram: npt.NDArray[np.int64]


@dataclass
class _Tally:
    """Why windows were left out, for an error that helps."""

    windows: int = 0
    nodata: int = 0
    unlabelled: int = 0
    dropped: int = 0

    def check(self, writer: _Writer) -> None:
        if writer.count and writer.has_train:
            return
        what = "chip for training" if writer.count else "chip"
        raise InputError(
            f"no {what} passes the filters: of {self.windows} windows {self.nodata} lack data (chips.max_nodata), "
            f"{self.unlabelled} have too few labels (chips.min_labelled), {self.dropped} were dropped "
            "(chips.drop_only); relax a filter, or choose a smaller chips.size"
        )


def _select(
    regions: Sequence[Place],
    legend: Legend,
    spec: ChipSpec,
    keep: Keep | None,
    tally: _Tally,
    on_progress: Steps | None,
) -> Iterator[Iterator[_Chip]]:
    """The chips of each block of the regions in turn, to be taken before the next block comes."""
    groups = dates_together(regions)
    total, done = sum(blocks_of(regions[group[0]]) * len(group) for group in groups), 0
    shared: dict[Window, list[_Target]] = {}
    for group in groups:
        with closing(cut([regions[index] for index in group], spec.windows)) as blocks:
            for date, windows in blocks:
                if date == 0:
                    shared.clear()  # a block has windows of its own
                tally.windows += len(windows)
                chips = (c for w in windows for c in _chips(group[date], *w, legend, spec, tally, shared))
                yield _kept(chips, regions[group[date]], legend, keep, tally)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)


def _kept(chips: Iterable[_Chip], region: Place, legend: Legend, keep: Keep | None, tally: _Tally) -> Iterator[_Chip]:
    for chip in chips:
        _check_codes(chip, region, legend)
        if keep is None or keep(chip.image, chip.label):
            yield chip
        else:
            tally.dropped += 1


class _Target(NamedTuple):
    """What a window has to teach in one part of the split."""

    part: int
    label: Labels
    histogram: npt.NDArray[np.int64]
    pixels: int


def _chips(
    region: int,
    window: Window,
    planes: Planes,
    legend: Legend,
    spec: ChipSpec,
    tally: _Tally,
    shared: dict[Window, list[_Target]],
) -> Iterator[_Chip]:
    """One window as a chip of each part for which it passes the filters.

    ``shared`` keeps the targets of windows that a date shows whole: they are the same for all such dates.
    """
    inside = planes.labels.size / window.size**2 * spec.size**2
    image, codes, parts = _to_size(_padded(planes, window.size, legend.nodata), spec.size, legend.nodata)
    present = np.count_nonzero(image[0])
    if inside - present > spec.max_nodata * inside:
        tally.nodata += 1
        return
    if present < codes.size or window.size != spec.size:
        targets = _targets(np.where(image[0] != 0, codes, np.uint8(legend.nodata)), parts, legend.nodata)
    else:
        if window not in shared:
            shared[window] = _targets(codes, parts, legend.nodata)
        targets = shared[window]
    enough = [target for target in targets if target.pixels and target.pixels >= spec.min_labelled * inside]
    tally.unlabelled += not enough
    for part, label, histogram, _ in enough:
        if spec.drop_only and not np.delete(histogram, spec.drop_only).any():
            tally.dropped += 1
        else:
            yield _Chip(image, label, (region, window.row, window.col), window.size, part, histogram)


def _targets(codes: Labels, parts: Labels, nodata: int) -> list[_Target]:
    """Labels of each part of the split that a window touches, nodata elsewhere."""
    lowest, highest = int(parts.min()), int(parts.max())
    targets = []
    for part in range(max(1, lowest), highest + 1):
        label = codes if lowest == highest else np.where(parts == part, codes, np.uint8(nodata))
        histogram = np.bincount(label.ravel(), minlength=256)
        histogram[nodata] = 0
        targets.append(_Target(part, label, histogram, int(histogram.sum())))
    return targets


def _check_codes(chip: _Chip, region: Place, legend: Legend) -> None:
    if unknown := sorted(set(np.flatnonzero(chip.histogram).tolist()) - set(legend.codes)):
        raise InputError(
            f"the labels of {region.name} hold {', '.join(map(str, unknown))}, which the legend {legend.name!r} does "
            "not know; remap them or add them to the legend"
        )


def _padded(planes: Planes, size: int, nodata: int) -> Planes:
    missing = [size - n for n in planes.labels.shape]
    if not any(missing):
        return planes
    around = [(0, n) for n in missing]
    return Planes(
        np.pad(planes.image, [(0, 0), *around]),
        np.pad(planes.labels, around, constant_values=nodata),
        np.pad(planes.parts, around),
    )


def one_chip(planes: Planes, window: int, part: int, spec: ChipSpec, nodata: int) -> tuple[Images, Labels]:
    """Return a window as :func:`write_chips` stores it for one part of the split.

    Parameters
    ----------
    planes
        Of the window; fewer pixels where it reaches beyond the area.
    window
        Pixels on its side.
    part
        Code of the part.
    spec
        With the size of a chip.
    nodata
        The legend's.

    Returns
    -------
    ndarray, ndarray
        (band, size, size) uint16 DN and (size, size) uint8 legend codes.
    """
    image, codes, parts = _to_size(_padded(planes, window, nodata), spec.size, nodata)
    return image, np.where((image[0] != 0) & (parts == part), codes, np.uint8(nodata))


def _to_size(planes: Planes, size: int, nodata: int) -> Planes:
    """Resample a window to the size of a chip: reflectance by area or linearly, labels and parts by nearest."""
    window = len(planes.labels)
    if window == size:
        return planes
    nearest = (np.arange(size) * 2 + 1) * window // (2 * size)
    here = np.ix_(nearest, nearest)
    present = planes.image[0] != 0
    weights = _weights(window, size)
    share = weights @ present.astype(np.float32) @ weights.T
    image = weights @ planes.image.astype(np.float32) @ weights.T / np.maximum(share, 1e-6)
    return Planes(
        # a pixel counts when at least half of what it is made of does; data never become nodata by rounding
        np.where(share >= 0.5, np.clip(np.rint(image), 1, 65535), 0).astype(np.uint16),
        np.where(present[here], planes.labels[here], np.uint8(nodata)),
        planes.parts[here],
    )


def _weights(window: int, size: int) -> npt.NDArray[np.float32]:
    """(size, window) float32, rows sum to 1: means over areas when shrinking, linear interpolation when growing."""
    scale = window / size
    centre = (np.arange(size)[:, None] + 0.5) * scale
    pixel = np.arange(window)[None] + 0.5
    if scale >= 1:
        low, high = np.maximum(centre - scale / 2, pixel - 0.5), np.minimum(centre + scale / 2, pixel + 0.5)
        weights = np.clip(high - low, 0, None)
    else:
        weights = np.clip(1 - np.abs(np.clip(centre, 0.5, window - 0.5) - pixel), 0, None)
    normalised: npt.NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


# -- writing ----------------------------------------------------------------------------------------------------------


class _Writer:
    """Gives chips their slots in the store, and stores those of some blocks while the next ones are read."""

    def __init__(self, partial: Path, path: Path, bands: int, size: int, legend: Legend, pixels: bool) -> None:
        self.path, self.count, self.has_train = path, 0, False
        self._codes = list(legend.codes)
        self._per_shard = max(1, min(256, _SHARD_BYTES // (bands * size * size * 2)))
        self._tables: dict[str, list[Any]] = {name: [] for name in _TABLES}
        self._sums = _Sums(bands)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chips")
        self._pending: deque[Future[_Sums]] = deque()
        with writing(path):
            self._group = zarr.open_group(str(partial.absolute()), mode="w", zarr_format=3)
            self._image, self._label = (
                ShardedPixels(partial, self._create(*array)) if pixels else _NoPixels()
                for array in (
                    ("image", (bands, size, size), np.uint16, 0),
                    ("label", (size, size), np.uint8, legend.nodata),
                )
            )

    def _create(self, name: str, shape: tuple[int, ...], dtype: type, fill: int) -> zarr.Array[Any]:
        return self._group.create_array(
            name,
            shape=(0, *shape),
            dtype=dtype,
            chunks=(1, *shape),
            shards=(self._per_shard, *shape),
            compressors=None,
            filters=None,
            fill_value=fill,
            dimension_names=("chip", *(("band",) if len(shape) == 3 else ()), "y", "x"),
        )

    def add(self, chips: Iterator[_Chip]) -> None:
        """Take the chips of one block. They are views that keep it in memory, so few of them wait to be stored."""
        while batch := list(islice(chips, self._per_shard)):
            for chip in batch:
                for name, value in (("origin", chip.origin), ("size", chip.size), ("part", chip.part)):
                    self._tables[name].append(value)
                self._tables["histogram"].append(chip.histogram[self._codes])
                self.has_train |= chip.part == _TRAIN
            self._pending.append(self._pool.submit(self._store, self.count, batch))
            self.count += len(batch)
            self._wait_for_all_but(_STORED_BEHIND)

    def _store(self, first: int, chips: list[_Chip]) -> _Sums:
        """Store chips from slot ``first`` on; return the sums of those that train."""
        sums = _Sums(len(self._sums.values))

        def images() -> Iterator[Images]:
            for chip in chips:
                image = np.ascontiguousarray(chip.image)  # counted and written while it is in the processor's cache
                if chip.part == _TRAIN:
                    sums.add(image)
                yield image

        with writing(self.path):
            self._image.write(first, images())
            self._label.write(first, (chip.label for chip in chips))
        return sums

    def _wait_for_all_but(self, number: int) -> None:
        while len(self._pending) > number:
            self._sums.add_all(self._pending.popleft().result())

    def finish(self, about: dict[str, Any]) -> None:
        self._wait_for_all_but(0)
        with writing(self.path):
            self._image.finish(self.count)
            self._label.finish(self.count)
            for name, dtype in _TABLES.items():
                self._group.create_array(name, data=np.array(self._tables[name], dtype))
            mean, std = self._sums.mean_and_std()
            self._group.attrs.update(about | {"s2seg_chips": _FORMAT, "mean": mean, "std": std})

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _NoPixels:
    """Stands where :class:`ShardedPixels` would, and stores nothing."""

    def write(self, first: int, chips: Iterable[npt.NDArray[Any]]) -> None:  # noqa: ARG002  as its like
        for _ in chips:  # they are counted on their way
            pass

    def finish(self, count: int) -> None:
        pass


class _Sums:
    """Of valid pixels, by band: Python's whole numbers, so that the order of the chips does not matter."""

    def __init__(self, bands: int) -> None:
        self.pixels, self.values, self.squares = 0, [0] * bands, [0] * bands

    def add(self, image: Images) -> None:
        flat = image.reshape(len(image), -1).astype(np.float64)
        # nodata pixels are 0 in all bands and add nothing; float64 holds the sums of one image exactly
        self._add(int(np.count_nonzero(image[0])), np.einsum("ij->i", flat), np.einsum("ij,ij->i", flat, flat))

    def add_all(self, other: _Sums) -> None:
        self._add(other.pixels, other.values, other.squares)

    def _add(self, pixels: int, values: Iterable[float], squares: Iterable[float]) -> None:
        self.pixels += pixels
        self.values = [a + int(b) for a, b in zip(self.values, values, strict=True)]
        self.squares = [a + int(b) for a, b in zip(self.squares, squares, strict=True)]

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per band, reflectance."""
        n = self.pixels
        variances = [(n * q - v * v) / n**2 for v, q in zip(self.values, self.squares, strict=True)]
        return [v / n / 1e4 for v in self.values], [max(v, 1.0) ** 0.5 / 1e4 for v in variances]


def _open(path: Path) -> tuple[zarr.Group, dict[str, Any]]:
    if not path.is_dir():
        raise InputError(f"there are no chips in {path}")
    try:
        group = zarr.open_group(str(path.absolute()), mode="r", zarr_format=3)
        about = dict(group.attrs)
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a chip store") from error
    if "s2seg_chips" not in about:
        raise InputError(f"{path} is not a chip store")
    if about["s2seg_chips"] != _FORMAT:
        raise InputError(f"the chips in {path} are of another version of s2seg; delete them, and cut them anew")
    return group, about


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    return cast("zarr.Array[Any]", group[name])


def _values(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    return np.asarray(_array(group, name)[...])
