"""Ready-cut pairs of image and mask as places to train on: GeoTIFF, PNG or JPEG, integer or coloured masks."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import rasterio
import xarray as xr
from dask.base import tokenize
from dask.delayed import delayed
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from s2seg.errors import InputError, S2SegWarning
from s2seg.legend import Legend
from s2seg.sources.label_codes import UNKNOWN, UnknownLabelsError, code_table, encode, resolve
from s2seg.training.splits import PARTS, deal, split_by_area

_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_LISTED = 3


@dataclass(frozen=True)
class TileSpec:
    """Where the pairs lie, and what their pixels mean.

    Parameters
    ----------
    images, labels
        Two folders; a mask has its image's name, whatever the suffix. If the images lie in sub-folders ``train``,
        ``validation`` (or ``val``) and ``test``, those are the split, and the masks lie in sub-folders alike.
    colors
        For coloured masks: ``#rrggbb`` -> legend code or class name, None for nodata. Without it, the legend's own
        colours stand for their classes, and black for nodata.
    remap
        For integer masks: value -> legend code or class name, None for nodata.
    """

    images: Path
    labels: Path
    colors: Mapping[str, int | str | None] | None = None
    remap: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Tile:
    """A pair as a region of its own: see :class:`s2seg.training.regions.Region`."""

    name: str
    scene: xr.DataArray
    labels: xr.DataArray
    split: xr.DataArray
    items: tuple[str, ...]
    date: str = field(default="")


def read_tiles(
    spec: TileSpec,
    legend: Legend,
    bands: Sequence[str],
    *,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> list[Tile]:
    """Find the pairs and make each a region; pixels are read when chips are cut.

    Images of 8 bits become DN so that white is a reflectance of 1, and their black is 1, not 0: it is dark, not
    missing, unless the file declares its nodata value. Images of 16 bits are DN already, with 0 for nodata.

    Parameters
    ----------
    spec
        Folders and colours.
    legend
        What the masks mean.
    bands
        Names of the images' bands, in the files' order. One band more, if it is alpha, is a mask; what counts as alpha
        in a file of as many bands as are named, such as near infrared beside RGB, is a band. A GeoTIFF holds any
        number, a PNG at most four, a JPEG three.
    fractions, seed
        The split over whole tiles, drawn at random, where no sub-folders give one.

    Returns
    -------
    list of Tile
        Sorted by name; for :func:`~s2seg.training.chips.write_chips` and
        :func:`~s2seg.training.splits.check_split`.

    Raises
    ------
    InputError
        If there are no pairs; if a pair's sizes differ; if an image has other bands, or floats; if a mask holds
        values or colours that mean nothing (when it is read).

    Warns
    -----
    S2SegWarning
        For images without a mask, and masks without an image: they are left out.
    """
    pairs = _pairs(spec)
    parts = _split([part for _, part, _, _ in pairs], fractions, seed)
    codes = _Codes.of(spec, legend)
    return [
        _tile(name, image, mask, part, codes, bands) for (name, _, image, mask), part in zip(pairs, parts, strict=True)
    ]


# -- files ------------------------------------------------------------------------------------------------------------


def _pairs(spec: TileSpec) -> list[tuple[str, str | None, Path, Path]]:
    """Names, parts (None if the folders give none), images and masks."""
    images, masks = _files(Path(spec.images)), _files(Path(spec.labels))
    names = sorted(images.keys() & masks.keys())
    if not names:
        raise InputError(
            f"no pairs: none of the {len(images)} images in {spec.images} has the name of one of the {len(masks)} "
            f"masks in {spec.labels} (looking for {', '.join(_SUFFIXES)})"
        )
    for what, lonely in (
        ("images without a mask", images.keys() - masks),
        ("masks without an image", masks.keys() - images.keys()),
    ):
        if lonely:
            more = ", ..." if len(lonely) > _LISTED else ""
            text = f"{len(lonely)} {what} are left out: {', '.join(sorted(lonely)[:_LISTED])}{more}"
            warnings.warn(text, S2SegWarning, stacklevel=3)
    return [(name, _part_of(name), images[name], masks[name]) for name in names]


def _part_of(name: str) -> str | None:
    """Part that the first sub-folder names."""
    return _FOLDERS.get(name.partition("/")[0]) if "/" in name else None


def _files(folder: Path) -> dict[str, Path]:
    """Path without suffix, relative to the folder -> file."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    for name, paths in found.items():
        if len(paths) > 1:
            raise InputError(f"{folder}: {name} is there twice ({', '.join(p.name for p in paths)}); remove one")
    return {name: paths[0] for name, paths in found.items()}


def _split(given: Sequence[str | None], fractions: tuple[float, float, float], seed: int) -> list[str]:
    """Part of each tile: what its folder says, or else a draw over all tiles."""
    if all(given):
        return [str(part) for part in given]
    if any(given):
        raise InputError(
            "some images lie in sub-folders train, validation, test and others do not: put all or none there"
        )
    order = np.random.default_rng(seed).permutation(len(given))
    parts = deal(np.ones(len(given), np.int64), np.array(fractions), order)
    return [PARTS[code - 1] for code in parts]


# -- pixels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Codes:
    """How masks become legend codes."""

    legend: Legend
    colors: Mapping[int, int]
    values: Mapping[int, int]

    @classmethod
    def of(cls, spec: TileSpec, legend: Legend) -> _Codes:
        named = spec.colors or {c.color: c.code for c in legend} | {"#000000": None}
        colors: dict[int, int] = {
            _packed(color): resolve(legend, value, f"colors {color!r}") for color, value in named.items()
        }
        values = {value: code for value, code in code_table(legend, spec.remap).items() if isinstance(value, int)}
        return cls(legend, colors, values)

    def translate(self, mask: npt.NDArray[Any], path: Path, nodata: float | None) -> npt.NDArray[np.uint8]:
        """(band, y, x) of a mask -> (y, x) legend codes."""
        if len(mask) >= 3:
            red, green, blue = mask[:3].astype(np.uint32)
            return self._look_up((red << 16) | (green << 8) | blue, self.colors, path, "colors")
        own = {} if nodata is None else {int(nodata): self.legend.nodata}
        return self._look_up(mask[0], {**self.values, **own}, path, "values")

    def _look_up(
        self, pixels: npt.NDArray[Any], table: Mapping[int, int], path: Path, what: str
    ) -> npt.NDArray[np.uint8]:
        codes = encode(pixels, table)
        unknown = codes == UNKNOWN
        if unknown.any():
            raise UnknownLabelsError(str(path), np.unique(pixels[unknown]).tolist(), self.legend, what)
        return codes.astype(np.uint8)


def _packed(color: str) -> int:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", str(color)):
        raise InputError(f"tiles.colors: {color!r} is not of the form #rrggbb")
    return int(color[1:], 16)


def _tile(name: str, image: Path, mask: Path, part: str, codes: _Codes, bands: Sequence[str]) -> Tile:
    shape = _check_pair(image, mask, bands)
    token = tokenize(str(image), str(mask), image.stat().st_mtime_ns, mask.stat().st_mtime_ns, codes)
    pixels = da.from_delayed(
        delayed(_read_image, pure=True)(image, len(bands), dask_key_name=f"image-{token}"),
        (len(bands), *shape),
        np.uint16,
    )
    labels = da.from_delayed(
        delayed(_read_mask, pure=True)(mask, codes, dask_key_name=f"mask-{token}"), shape, np.uint8
    )
    coords: dict[str, Any] = {"y": np.arange(shape[0]) + 0.5, "x": np.arange(shape[1]) + 0.5}
    coords["spatial_ref"] = 0  # a grid without a CRS: predictions hand it on
    truth = xr.DataArray(labels, dims=("y", "x"), coords=coords)
    return Tile(
        name=name,
        scene=xr.DataArray(pixels, dims=("band", "y", "x"), coords=coords | {"band": list(bands)}),
        labels=truth,
        split=split_by_area(truth, part),
        items=(name,),
    )


def _check_pair(image: Path, mask: Path, bands: Sequence[str]) -> tuple[int, int]:
    with _open(image) as a, _open(mask) as b:
        if a.shape != b.shape:
            raise InputError(f"{image} has {a.shape} pixels, and its mask {mask} {b.shape}")
        if a.count != len(bands) and not _has_mask(a, len(bands)):
            raise InputError(f"{image} has {a.count} bands, and {len(bands)} are named: {', '.join(bands)}")
        if a.dtypes[0] not in ("uint8", "uint16"):
            raise InputError(f"{image} holds {a.dtypes[0]}: convert it to Byte or UInt16 (reflectance x 10000)")
        if not np.issubdtype(np.dtype(b.dtypes[0]), np.integer):
            raise InputError(f"{mask} holds {b.dtypes[0]}, and classes are integers: gdal_translate -ot Byte")
        if b.count >= 3 and b.dtypes[0] != "uint8":
            raise InputError(f"{mask} has {b.count} bands of {b.dtypes[0]}: a coloured mask has three of uint8")
        return int(a.height), int(a.width)


@contextmanager
def _open(path: Path) -> Iterator[rasterio.DatasetReader]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # pictures need no place
            with rasterio.open(path) as dataset:
                yield dataset
    except RasterioError as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _has_mask(dataset: rasterio.DatasetReader, bands: int) -> bool:
    """Whether alpha comes after the bands: GDAL calls every fourth band of 8 bits so, named or not."""
    return bool(dataset.count == bands + 1 and dataset.colorinterp[bands] == ColorInterp.alpha)


def _read_image(path: Path, bands: int) -> npt.NDArray[np.uint16]:
    with _open(path) as dataset:
        data = dataset.read(list(range(1, bands + 1)))
        missing = (data == dataset.nodata).any(axis=0) if dataset.nodata is not None else np.zeros(dataset.shape, bool)
        if _has_mask(dataset, bands):
            missing |= dataset.read(bands + 1) == 0
    if data.dtype == np.uint8:
        scaled: npt.NDArray[np.uint16] = np.maximum(data.astype(np.uint32) * 10000 // 255, 1).astype(np.uint16)
    else:
        scaled = data.astype(np.uint16)
    scaled[:, missing] = 0
    return scaled


def _read_mask(path: Path, codes: _Codes) -> npt.NDArray[np.uint8]:
    with _open(path) as dataset:
        data, nodata = dataset.read(), dataset.nodata
    return codes.translate(data, path, nodata)
