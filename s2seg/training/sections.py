"""The sections of a training configuration: pydantic models, each checked by itself. `config` puts them together."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    InstanceOf,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.sources.catalogs import CATALOGS
from s2seg.sources.composite import DEFAULT_MASK, CompositeSpec, Method
from s2seg.training.loss_names import parse_loss

Part = Literal["train", "validation", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what all generators of random numbers take
Side = Annotated[int, Field(gt=0, le=4096)]  # a window is held in memory whole, several at a time


class Section(BaseModel):
    """Base of all sections: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"cannot be {str(value).lower()}")
        return value


def resolve(href: str, info: ValidationInfo) -> str:
    """Make a relative path absolute, counted from ``context["folder"]``; names, URLs and ``/vsi`` paths stay."""
    folder = (info.context or {}).get("folder")
    if folder is None or "://" in href or href.startswith("/vsi"):
        return href
    return str((Path(folder) / Path(href).expanduser()).resolve())


def _resolve_catalog(href: str, info: ValidationInfo) -> str:
    return href if href in CATALOGS else resolve(href, info)


def _resolve_weights(href: str, info: ValidationInfo) -> str:
    return href if href == "imagenet" else resolve(href, info)


def _resolve_aoi(aoi: Any, info: ValidationInfo) -> Any:
    # WKT has brackets, a file name hardly ever; everything else that is not text is given in place
    return resolve(aoi, info) if isinstance(aoi, str) and "(" not in aoi else aoi


Href = Annotated[str, Field(min_length=1), AfterValidator(resolve)]
"""A path or URL; a relative path counts from the folder of the configuration file."""


def _legend(value: Any, info: ValidationInfo) -> Any:
    """Read a legend given by built-in name, by path or in place."""
    try:
        if isinstance(value, str):
            # a name keeps its spelling, so that an error shows what was written
            return Legend.load(resolve(value, info) if Path(value).suffix else value)
        return Legend.from_dict({"name": "legend", **value}) if isinstance(value, Mapping) else value
    except InputError as error:
        raise ValueError(str(error)) from error


LegendField = Annotated[InstanceOf[Legend], BeforeValidator(_legend), PlainSerializer(Legend.to_dict)]


class CompositeSection(Section):
    """How dates become one scene."""

    method: Method = Field(default="median", description="how the clear dates are reduced")
    mask: tuple[str, ...] = Field(
        default=DEFAULT_MASK, description="scene classes (SCL) to leave out; empty keeps everything"
    )
    dilate: NonNegativeFloat = Field(default=0.0, description="metres by which the mask grows")
    percentile: float = Field(default=25.0, ge=0, le=100, description="for percentile: 0 to 100")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, CompositeSpec):
            return asdict(value)
        return {"method": value} if isinstance(value, str) else value


class _AsSection:
    """Validates a `CompositeSpec` as the section that describes it, so that an error names the key."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        section = handler.generate_schema(CompositeSection)
        return core_schema.no_info_after_validator_function(
            cls._build, section, serialization=core_schema.plain_serializer_function_ser_schema(asdict)
        )

    @staticmethod
    def _build(section: CompositeSection) -> CompositeSpec:
        try:
            return CompositeSpec(**section.model_dump())
        except InputError as error:
            raise ValueError(str(error)) from error


CompositeField = Annotated[CompositeSpec, _AsSection]


class RasterLabelsConfig(Section):
    """Labels from a raster: a GeoTIFF or COG, or an asset of a STAC item."""

    raster: Href = Field(description="GeoTIFF or COG, or a STAC item (JSON)", examples=["labels.tif"])
    resampling: Literal["mode", "nearest"] = Field(default="mode", description="how labels reach the grid of the scene")
    band: PositiveInt = Field(default=1, description="band of the raster, from 1")
    asset: str | None = Field(default=None, description="asset of a STAC item that holds the labels")
    colors: dict[str, int | str | None] | None = Field(
        default=None, description="for an RGB mask: '#rrggbb' to legend code or class name; null drops it"
    )
    remap: dict[int | str, int | str | None] | None = Field(
        default=None, description="value in the file to legend code or class name; null drops it"
    )


class VectorLabelsConfig(Section):
    """Labels from the features of a vector file."""

    vector: Href = Field(description="GeoPackage, GeoJSON, GeoParquet or shapefile", examples=["labels.gpkg"])
    column: str = Field(description="column that holds the class", examples=["class"])
    layer: str | None = Field(default=None, description="layer of the file; the first by default")
    all_touched: bool = Field(default=False, description="burn every pixel that a feature touches, not only its centre")
    priority: tuple[int | str, ...] | None = Field(
        default=None, description="values by rank, the one that wins last; without it later features win"
    )
    remap: dict[int | str, int | str | None] | None = Field(
        default=None, description="value in the file to legend code or class name; null drops it"
    )


def _kind_of_labels(value: Any) -> str | None:
    keys = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    kinds = [kind for kind in ("raster", "vector") if kind in keys]
    return f"<{kinds[0]}>" if len(kinds) == 1 else None


LabelsField = Annotated[
    Annotated[RasterLabelsConfig, Tag("<raster>")] | Annotated[VectorLabelsConfig, Tag("<vector>")],
    Discriminator(
        _kind_of_labels,
        custom_error_type="labels",
        custom_error_message="give either raster: PATH, or vector: PATH and column: NAME",
    ),
]


def _texts(value: Any) -> Any:
    """Let YAML's numbers and dates be what they were written as: one query, or several."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(v) if isinstance(v, int | float | datetime.date) else v for v in values)


class AreaConfig(Section):
    """One place: where its scenes and labels come from."""

    name: str = Field(min_length=1, description="a short name", examples=["area"])
    catalog: Annotated[str, AfterValidator(_resolve_catalog)] = Field(
        description="catalog's name, URL or path", examples=["earth-search"]
    )
    collection: str | None = Field(default=None, description="STAC collection; by default the catalog's own choice")
    datetime: Annotated[tuple[str, ...], BeforeValidator(_texts)] = Field(
        min_length=1,
        description="when: 2020-08, or 2020-06-01/2020-08-31; a list gives one scene per entry, with the same labels",
        examples=["2020-08"],
    )
    aoi: Annotated[tuple[float, float, float, float] | dict[str, Any] | str | None, AfterValidator(_resolve_aoi)] = (
        Field(default=None, description="west, south, east, north in degrees, a GeoJSON file or WKT; null: the labels'")
    )
    max_cloud_cover: float | None = Field(
        default=None, ge=0, le=100, description="leave out cloudier scenes, in percent"
    )
    labels: LabelsField = Field(description="raster: PATH, or vector: PATH and column: NAME")
    split: Part | None = Field(default=None, description="part of the whole area, for split.by area")


class TilesConfig(Section):
    """Ready-cut pairs of images and masks, matched by file name."""

    images: Href = Field(description="folder of GeoTIFF, PNG or JPEG tiles", examples=["tiles/images"])
    labels: Href = Field(description="folder of masks, with the images' file names", examples=["tiles/labels"])
    colors: dict[str, int | str | None] | None = Field(
        default=None,
        description="for RGB masks: '#rrggbb' to legend code or class name, null drops it; null: the legend's colours",
    )
    remap: dict[int | str, int | str | None] | None = Field(
        default=None, description="value in the masks to legend code or class name; null drops it"
    )


class SplitConfig(Section):
    """Which ground is learned from, which is watched during training, and which is kept for the scores."""

    by: Literal["blocks", "area", "geometries"] = Field(
        default="blocks", description="never by single chips: they overlap"
    )
    block: PositiveInt = Field(default=256, description="pixels on a side of a block")
    fractions: tuple[Share, Share, Share] = Field(
        default=(0.7, 0.15, 0.15), description="train, validation and test, of the labelled pixels"
    )
    buffer: int = Field(default=0, ge=0, le=2048, description="pixels left out on each side of a border between parts")
    seed: Seed = Field(default=0, description="decides which block goes where")
    geometries: dict[Part, Href] | None = Field(
        default=None, description="for geometries: vector file of validation and of test; the rest is train"
    )

    @field_validator("fractions")
    @classmethod
    def _whole(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"train, validation and test add up to {sum(value):g}, not to 1")
        if min(value[:2]) == 0:
            raise ValueError("train and validation need a share each; only test may be 0")
        return value

    @model_validator(mode="after")
    def _has_geometries(self) -> SplitConfig:
        if (self.by == "geometries") != (self.geometries is not None):
            raise ValueError("by: geometries and the key geometries (validation: FILE, test: FILE) go together")
        return self


class ChipsConfig(Section):
    """How training samples are cut."""

    size: Side = Field(default=128, description="pixels on a side, a multiple of the network's stride")
    stride: PositiveInt = Field(
        default=64, description="pixels from one chip to the next; less than size overlaps them"
    )
    sizes: Annotated[tuple[Side, ...], BeforeValidator(lambda v: () if v is None else v)] = Field(
        default=(), description="further windows in pixels, resampled to size: several scales"
    )
    min_labelled: Share = Field(default=0.1, description="least share of labelled pixels")
    max_nodata: Share = Field(default=0.5, description="greatest share of pixels without data, clouds among them")
    drop_only: tuple[str, ...] = Field(default=(), description="classes by name: a chip of nothing else is left out")
    store: bool = Field(
        default=True,
        description="false: chips are not written to disk, but read from their scenes whenever they are asked for: "
        "slower, for areas whose chips would not fit",
    )

    @model_validator(mode="after")
    def _no_gaps(self) -> ChipsConfig:
        if self.stride > self.size:
            raise ValueError(f"stride {self.stride} is larger than size {self.size}: pixels between would be lost")
        return self


_LEVELS = {"pspnet": 3, "dpt": 4}
"""Of segmentation_models_pytorch's architectures by default, where these are not 5."""


class NetworkConfig(Section):
    """What is trained."""

    architecture: str = Field(
        default="Unet", description="Unet, UnetPlusPlus, DeepLabV3Plus, FPN, Segformer, MAnet, ..."
    )
    encoder: str = Field(default="resnet18", description="of segmentation_models_pytorch, or tu- and a timm name")
    weights: Annotated[str | None, AfterValidator(lambda v, info: v and _resolve_weights(v, info))] = Field(
        default=None,
        description="where training starts: null (from scratch), imagenet, or a path or URL of weights or a model",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="the architecture's own, such as {encoder_depth: 3}"
    )
    full_resolution: NonNegativeInt = Field(
        default=0, description="channels of a branch that sees single pixels beside the network; 0: none"
    )
    depth: NonNegativeInt | None = Field(
        default=None, description="pixels of context on each side of a block when mapping; null: three strides"
    )

    @field_validator("arguments")
    @classmethod
    def _depth_is_whole(cls, value: dict[str, Any]) -> dict[str, Any]:
        depth = value.get("encoder_depth", 5)
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= 6:
            raise ValueError(f"encoder_depth is a whole number of levels from 1 to 6, not {depth!r}")
        return value

    @property
    def levels(self) -> int:
        """Of the encoder; each halves the resolution."""
        return int(self.arguments.get("encoder_depth", _LEVELS.get(self.architecture.lower(), 5)))

    @property
    def stride(self) -> int:
        """Total downsampling, 2 to the number of the encoder's levels: sides of windows are its multiples."""
        return int(2**self.levels)


class OptimizerConfig(Section):
    """How weights move."""

    name: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="the method")
    learning_rate: PositiveFloat = Field(default=1e-3, description="highest learning rate")
    encoder_learning_rate: PositiveFloat | None = Field(default=None, description="the encoder's own; null: the same")
    weight_decay: NonNegativeFloat = Field(default=1e-4, description="pull of the weights towards zero")
    freeze_encoder: NonNegativeInt = Field(default=0, description="epochs for which the encoder stays as it is")


class FitConfig(Section):
    """How long and how training runs."""

    epochs: PositiveInt = Field(default=20, description="at most this many")
    steps_per_epoch: PositiveInt | None = Field(
        default=None, description="batches in an epoch; null: each chip about once"
    )
    batch_size: PositiveInt = Field(default=16, description="chips in a batch")
    accumulate: PositiveInt = Field(default=1, description="batches summed before the weights move")
    average: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="keep a moving average of the weights, with this decay in each step, such as 0.99; 0: none",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the arithmetic; auto: bfloat16 where the machine is fast at it"
    )
    sampling: Literal["balanced", "uniform"] = Field(
        default="balanced", description="balanced draws each class equally often, uniform takes each chip once"
    )
    patience: PositiveInt | None = Field(default=None, description="stop after this many epochs without a better score")
    keep: Literal["best", "last"] = Field(
        default="best",
        description="weights of which epoch: last, where the validation part is small and its best is chance",
    )
    seed: Seed = Field(default=0, description="the same seed gives the same weights on a CPU")
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = Field(default="auto", description="where it runs")
    devices: PositiveInt = Field(default=1, description="how many of them; several run as DDP")

    @model_validator(mode="after")
    def _last_is_the_end(self) -> FitConfig:
        if self.keep == "last" and self.patience is not None:
            raise ValueError(
                "keep: last would keep the weights of the epoch that patience gives up at; drop one of them"
            )
        return self


class AugmentConfig(Section):
    """How chips are varied; 0, false or null switches a variation off."""

    flips: bool = Field(default=True, description="mirrored and turned by quarters")
    scale: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=(0.8, 1.25), description="zoom, least and greatest"
    )
    gain: NonNegativeFloat = Field(default=0.1, description="spread of the brightness, common and per band")
    offset: NonNegativeFloat = Field(default=0.01, description="spread of what is added, in reflectance")
    noise: NonNegativeFloat = Field(default=0.0, description="spread of the noise of each pixel, in reflectance")
    blur: Share = Field(default=0.0, description="share of chips that are blurred")
    band_dropout: Share = Field(default=0.0, description="share of chips that lose a band")
    haze: Share = Field(default=0.0, description="share of chips under synthetic haze")
    clouds: Share = Field(default=0.0, description="share of chips with synthetic clouds; what they hide has no label")
    cutmix: Share = Field(default=0.0, description="share of chips with a rectangle of another one (CutMix)")
    copy_paste: Share = Field(default=0.0, description="share of chips that get rare classes of another one")
    mixed_dates: Share = Field(
        default=0.0, description="share of chips with a rectangle of another date of the same place (areas.datetime)"
    )

    @field_validator("scale")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"least first, then greatest, not {value[0]:g}, {value[1]:g}")
        return value


def check_loss(text: str) -> str:
    """Return ``text`` if it is a loss or a sum of losses; raise ValueError if not."""
    try:
        parse_loss(text)
    except InputError as error:
        raise ValueError(str(error).removeprefix(f"loss {text!r}: ")) from error
    return text


class TuneConfig(Section):
    """What `s2seg tune` tries beside the configured settings, which are its first trial; no training depends on it."""

    learning_rate: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(1e-4, 1e-2), description="least and greatest; the configured one widens it"
    )
    losses: tuple[Annotated[str, AfterValidator(check_loss)], ...] | None = Field(
        default=None, description="each written as loss is; null: usual ones, empty: none but the configured"
    )
    encoders: tuple[str, ...] | None = Field(default=None, description="names as of network.encoder; null: usual ones")
    batch_sizes: tuple[PositiveInt, ...] | None = Field(
        default=None, description="chips in a batch; null: 8, 16 and 32"
    )
    chip_sizes: tuple[Side, ...] | None = Field(
        default=None, description="pixels on a side, for each of which chips are cut; null: half and twice chips.size"
    )

    @field_validator("learning_rate")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"least first, then greatest, not {value[0]:g}, {value[1]:g}")
        return value


def check_season(text: str) -> str:
    """Return ``text`` if it is a season, ``MM-DD/MM-DD``; raise ValueError if not."""
    match = re.fullmatch(r"(\d\d)-(\d\d)/(\d\d)-(\d\d)", text)
    days = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if match:
        numbers = [int(group) for group in match.groups()]
        if all(1 <= m <= 12 and 1 <= d <= days[m - 1] for m, d in (numbers[:2], numbers[2:])):
            return text
    raise ValueError(f"{text!r} is not a season: MM-DD/MM-DD, such as 06-01/08-31")
