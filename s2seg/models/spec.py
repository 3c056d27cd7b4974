"""What a model expects and what its answers mean: the contents of ``model.json``, with neither torch nor weights."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError
from s2seg.legend import Legend

VERSION = 1
"""Layout of the ``s2seg:`` properties; a bundle written by a newer s2seg is refused, not guessed at."""

PREFIX = "s2seg:"
ONNX = "onnx"
"""The architecture name of a foreign network that is a file of its own."""

WEIGHTS_FILES = {True: "model.onnx", False: "weights.safetensors"}
"""The only names that a weights file can have, by ``spec.is_onnx``: a path in ``model.json`` leads nowhere else."""

_BAND = re.compile(r"[a-z][a-z0-9_]*(@\w+)?")
_MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
_LARGEST = 16384  # pixels on a side that a network sees, in any sense
_ACTIVATIONS = ("logits", "probabilities")


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a network but its weights; checked when made.

    A network's input is ``(dn * scale - mean) / std`` per band, float32 (batch, band, y, x), where ``dn`` is the
    stack's uint16. Its output is (batch, class, y, x), and channel ``i`` means ``legend.codes[i]``.

    Parameters
    ----------
    name
        A short name for people.
    bands
        STAC common names in channel order, such as ``("blue", "green", "red", "nir")``.
    legend
        At least two classes, in the order of the output channels.
    mean, std
        Per band, in reflectance; every ``std`` is positive.
    architecture
        ``{"name": "Unet", "encoder": "mobilenet_v2", ...}`` for :func:`s2seg.models.build_network`, or
        ``{"name": "onnx"}``.
    scale
        Factor from stored numbers to reflectance.
    activation
        What the network returns: ``logits`` (softmax is applied here) or ``probabilities``.
    stride
        The network's total downsampling: windows start on its multiples and their sides are multiples of it.
    depth
        Suggested pixels of context on each side of a block, a multiple of ``stride``.
    window
        The only side that inputs may have, or None where any multiple of ``stride`` will do.
    global_context
        Whether the answer at a pixel depends on the whole window (squeeze-and-excite, attention, global pooling):
        such windows are blended with a taper instead of being trimmed.
    seasons
        Name -> ``MM-DD/MM-DD`` where the bands are composites of several seasons, named ``red@spring``.
    provenance, metrics
        Plain values for the record: data, licence, citation; scores.

    Raises
    ------
    InputError
        Naming the field that makes no sense.
    """

    name: str
    bands: tuple[str, ...]
    legend: Legend
    mean: tuple[float, ...]
    std: tuple[float, ...]
    architecture: Mapping[str, Any]
    scale: float = 1e-4
    activation: str = "logits"
    stride: int = 32
    depth: int = 96
    window: int | None = None
    global_context: bool = False
    seasons: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, convert in _CONVERSIONS.items():
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        self._check_bands()
        self._check_geometry()
        if len(self.legend) < 2:
            raise InputError(f"legend {self.legend.name!r}: a segmentation model needs at least two classes")
        if not isinstance(self.architecture.get("name"), str):
            raise InputError('architecture: a "name" is missing, such as {"name": "Unet", "encoder": "resnet18"}')

    def _check_bands(self) -> None:
        if not self.bands:
            raise InputError("bands: a model needs at least one")
        for i, band in enumerate(self.bands):
            if not _BAND.fullmatch(band):
                raise InputError(f"bands[{i}]: {band!r} is not a STAC common name such as blue, nir or swir16")
            if band in self.bands[:i]:
                raise InputError(f"bands[{i}]: {band!r} is given twice")
            season = band.partition("@")[2]
            if (season or self.seasons) and season not in self.seasons:
                raise InputError(
                    f"bands[{i}]: {band!r} is of none of the seasons ({', '.join(self.seasons) or 'none'})"
                )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.bands):
                raise InputError(f"{name}: {len(getattr(self, name))} values for {len(self.bands)} bands")
        for i, std in enumerate(self.std):
            if std <= 0:
                raise InputError(f"std[{i}]: {std:g} is not positive")
        if self.scale <= 0:
            raise InputError(f"scale: {self.scale:g} is not positive")

    def _check_geometry(self) -> None:
        if self.stride < 1:
            raise InputError(f"stride: {self.stride} is not positive")
        if self.depth < 0 or self.depth % self.stride:
            raise InputError(f"depth: {self.depth} is not a multiple of the stride {self.stride}")
        for name in ("stride", "depth", "window"):
            if (getattr(self, name) or 0) > _LARGEST:
                raise InputError(f"{name}: {getattr(self, name)} is more than {_LARGEST} pixels, which no memory holds")
        if self.window is not None and (self.window % self.stride or self.window <= 2 * self.depth):
            raise InputError(
                f"window: {self.window} is not a multiple of the stride {self.stride} "
                f"larger than twice the depth {self.depth}"
            )

    @property
    def blends(self) -> bool:
        """Whether windows overlap and are averaged, as an answer depends on its window's size."""
        return self.window is not None or self.global_context

    @property
    def is_onnx(self) -> bool:
        """Whether the network is an ONNX file instead of weights for an architecture."""
        return bool(self.architecture["name"] == ONNX)

    @property
    def weights_file(self) -> str:
        """Name of the file that holds the weights."""
        return WEIGHTS_FILES[self.is_onnx]

    def affine(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return ``a`` and ``b`` (band,) float32 such that the network's input is ``dn * a + b``."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (self.scale / std).astype(np.float32), (-mean / std).astype(np.float32)

    def to_item(self, weights_sha256: str) -> dict[str, Any]:
        """Return ``model.json``: a STAC Item (1.1) with the MLM extension, plus this spec under ``s2seg:``.

        Parameters
        ----------
        weights_sha256
            Hex digest of the weights file, so that a damaged copy is noticed.
        """
        return {
            "type": "Feature",
            "stac_version": "1.1.0",
            "stac_extensions": [_MLM],
            "id": _slug(self.name),
            # a model is not bound to a place or a day: anywhere, since the first Sentinel-2 was launched
            "geometry": {"type": "Polygon", "coordinates": [_WORLD]},
            "bbox": [-180.0, -90.0, 180.0, 90.0],
            "properties": {
                "title": self.name,
                "datetime": None,
                "start_datetime": "2015-06-23T00:00:00Z",
                "end_datetime": "9999-12-31T23:59:59Z",
                **self._mlm(),
                **self._own(weights_sha256),
            },
            "links": [],
            "assets": {
                "weights": {
                    "href": f"./{self.weights_file}",
                    "type": "application/octet-stream" + ("; application=onnx" if self.is_onnx else ""),
                    "title": "ONNX network" if self.is_onnx else "weights (safetensors)",
                    "roles": ["mlm:model", "mlm:weights", "data"],
                    "mlm:artifact_type": "onnx" if self.is_onnx else "safetensors",
                }
            },
        }

    def _own(self, weights_sha256: str) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _FIELDS} | {"legend": self.legend.to_dict()}
        values |= {"version": VERSION, "weights_sha256": weights_sha256}
        return {PREFIX + key: _plain(key, value) for key, value in values.items()}

    def _mlm(self) -> dict[str, Any]:
        """Describe the network to readers of the MLM extension, for whom the input is the stored numbers."""
        side = self.window or -1
        dims = ["height", "width"]
        scaling = [
            {"type": "z-score", "mean": mean / self.scale, "stddev": std / self.scale}
            for mean, std in zip(self.mean, self.std, strict=True)
        ]
        classes = [
            {"value": c.code, "name": _slug(c.name), "description": c.name, "color_hint": c.color[1:].upper()}
            for c in self.legend.classes
        ]
        return {
            "mlm:name": _slug(self.name),
            "mlm:architecture": str(self.architecture["name"]),
            "mlm:framework": "ONNX" if self.is_onnx else "PyTorch",
            "mlm:tasks": ["semantic-segmentation"],
            "mlm:input": [
                {
                    "name": "Sentinel-2 reflectance, stored as whole numbers",
                    "bands": list(self.bands),
                    "input": {
                        "shape": [-1, len(self.bands), side, side],
                        "dim_order": ["batch", "bands", *dims],
                        "data_type": "float32",
                    },
                    "value_scaling": scaling,
                    "pre_processing_function": None,
                }
            ],
            "mlm:output": [
                {
                    "name": self.activation,
                    "tasks": ["semantic-segmentation"],
                    "result": {
                        "shape": [-1, len(self.legend), side, side],
                        "dim_order": ["batch", "class", *dims],
                        "data_type": "float32",
                    },
                    "classification:classes": classes,
                    "post_processing_function": None,
                }
            ],
        }

    @classmethod
    def from_item(cls, item: Any) -> tuple[ModelSpec, str]:
        """Read what :meth:`to_item` wrote; only the ``s2seg:`` properties count.

        Returns
        -------
        ModelSpec, str
            The spec, and the weights' recorded SHA-256.

        Raises
        ------
        InputError
            Naming the key that is missing or wrong.
        """
        if not isinstance(item, dict) or not isinstance(item.get("properties"), dict):
            raise InputError("not a STAC item: an object `properties` is missing")
        own = {k.removeprefix(PREFIX): v for k, v in item["properties"].items() if k.startswith(PREFIX)}
        _check_version(own.get("version"))
        required = [f for f in _FIELDS if f not in _OPTIONAL] + ["weights_sha256"]
        missing = [f for f in required if f not in own]
        if missing:
            raise InputError(f"properties.{PREFIX}{missing[0]} is missing")
        if not re.fullmatch(r"[0-9a-f]{64}", str(own["weights_sha256"])):
            raise InputError(f"properties.{PREFIX}weights_sha256: not 64 hexadecimal digits")
        try:
            legend = Legend.from_dict(own["legend"])
            values = {f: own[f] for f in _FIELDS if f in own} | {"legend": legend}
            return cls(**values), own["weights_sha256"]
        except InputError as error:
            raise InputError(f"properties.{PREFIX}{error}") from error


def _check_version(version: Any) -> None:
    if version is None:
        raise InputError(f"properties.{PREFIX}version is missing: a STAC item, but not one of an s2seg model")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"properties.{PREFIX}version: {version!r} is not a whole number from 1")
    if version > VERSION:
        raise InputError(f"written by a newer s2seg (layout {version}, known up to {VERSION}): update s2seg")


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a whole number of more than 30 digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {value!r} is not a text")
    return value


def _number(where: str, value: Any) -> float:
    if not isinstance(value, bool | str) and isinstance(value, float | int | np.number):
        with contextlib.suppress(OverflowError):  # of whole numbers beyond floats
            if math.isfinite(number := float(value)):
                return number
    raise InputError(f"{where}: {_shortened(value)} is not a finite number")


def _integer(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{where}: {value!r} is not a whole number")
    return int(value)


def _optional_integer(where: str, value: Any) -> int | None:
    return None if value is None else _integer(where, value)


def _boolean(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where}: {value!r} is neither true nor false")
    return value


def _activation(where: str, value: Any) -> str:
    if value not in _ACTIVATIONS:
        raise InputError(f"{where}: {value!r} is not one of {', '.join(_ACTIVATIONS)}")
    return str(value)


def _legend(where: str, value: Any) -> Legend:
    if not isinstance(value, Legend):
        raise InputError(f"{where}: {value!r} is not a Legend")
    return value


def _each(check: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    def convert(where: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise InputError(f"{where}: {value!r} is not a list")
        return tuple(check(f"{where}[{i}]", v) for i, v in enumerate(value))

    return convert


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is not an object")
    return dict(_plain(where, value))


def _texts(where: str, value: Any) -> dict[str, str]:
    return {name: _text(f"{where}.{name}", text) for name, text in _mapping(where, value).items()}


def _plain(where: str, value: Any) -> Any:
    """Return ``value`` as JSON can hold it; a score that is not a number (an absent class) becomes null."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{where}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{where}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"{where}: {type(value).__name__} cannot be written to model.json; give plain values")


_CONVERSIONS: dict[str, Callable[[str, Any], Any]] = {
    "name": _text,
    "bands": _each(_text),
    "legend": _legend,
    "mean": _each(_number),
    "std": _each(_number),
    "architecture": _mapping,
    "scale": _number,
    "activation": _activation,
    "stride": _integer,
    "depth": _integer,
    "window": _optional_integer,
    "global_context": _boolean,
    "seasons": _texts,
    "provenance": _mapping,
    "metrics": _mapping,
}
_FIELDS = tuple(_CONVERSIONS)
_OPTIONAL = {"window", "seasons", "provenance", "metrics"}
_WORLD = [[-180.0, -90.0], [180.0, -90.0], [180.0, 90.0], [-180.0, 90.0], [-180.0, -90.0]]


def _slug(name: str) -> str:
    """Return ``name`` in the alphabet that STAC's model and class names are limited to."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return slug if re.fullmatch(r"[A-Za-z].+", slug) else f"model-{slug}".rstrip("-")
