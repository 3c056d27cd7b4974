"""One YAML file says what is trained, on what and how: its schema, how it is read, and what identifies it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from s2seg.errors import InputError
from s2seg.sources.composite import CompositeSpec
from s2seg.sources.items import BANDS
from s2seg.training.sections import (
    AreaConfig,
    AugmentConfig,
    ChipsConfig,
    CompositeField,
    CompositeSection,
    FitConfig,
    LegendField,
    NetworkConfig,
    OptimizerConfig,
    RasterLabelsConfig,
    Section,
    SplitConfig,
    TilesConfig,
    TuneConfig,
    VectorLabelsConfig,
    check_loss,
    check_season,
)
from s2seg.yamlfile import parse_yaml, read_yaml

__all__ = [
    "AreaConfig",
    "AugmentConfig",
    "ChipsConfig",
    "ConfigError",
    "FitConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RasterLabelsConfig",
    "SplitConfig",
    "TilesConfig",
    "TrainConfig",
    "TuneConfig",
    "VectorLabelsConfig",
    "load_config",
]

_OPTICAL = tuple(band for band in BANDS if band != "scl")
_DATA = (
    *("legend", "bands", "resolution", "crs", "composite", "resampling"),
    *("seasons", "areas", "tiles", "split", "chips"),
)
"""What decides the chips."""

_BESIDE = {"name", "logs", "tune"}
"""What decides neither the chips nor the weights."""

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")
_SEASON_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BATCH_BYTES = 4 * 2**30
"""Of a batch's pixels, at most: what the network makes of them takes tens of times as much."""


class ConfigError(InputError):
    """A configuration file makes no sense.

    Parameters
    ----------
    path
        The file.
    problems
        One text for each mistake: the key, what is wrong, and how to mend it.
    """

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        super().__init__(path, tuple(problems))
        self.path, self.problems = path, tuple(problems)

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.problems)}"


class TrainConfig(Section):
    """All that decides a training run; read from YAML by :func:`load_config`.

    Raises
    ------
    pydantic.ValidationError
        When made from values that make no sense; :func:`load_config` turns it into a `ConfigError`.
    """

    name: str = Field(min_length=1, description="the model's name; by default the file's", examples=["model"])
    legend: LegendField = Field(
        description="the classes: a built-in legend's name, a YAML file, or the legend itself", examples=["worldcover"]
    )
    bands: tuple[str, ...] = Field(
        min_length=1,
        description="STAC common names, in the order of the network's input",
        examples=[["blue", "green", "red", "nir", "swir16", "swir22"]],
    )
    resolution: PositiveFloat = Field(default=10.0, description="metres per pixel")
    crs: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)] = Field(
        default=None, description="projected CRS; by default the UTM zone that holds most of an area"
    )
    composite: CompositeField = Field(
        default_factory=CompositeSpec,
        description="how dates become one scene; a method's name will do",
    )
    resampling: Literal["nearest", "bilinear"] = Field(
        default="nearest", description="how 20 and 60 m bands reach a finer grid"
    )
    seasons: dict[str, Annotated[str, AfterValidator(check_season)]] = Field(
        default_factory=dict,
        description="each a composite of its own, its bands stacked as red@spring: {spring: 03-01/05-31, ...}",
    )
    areas: tuple[AreaConfig, ...] = Field(default=(), description="the places with labels")
    tiles: TilesConfig | None = Field(default=None, description="ready-cut pairs of images and masks, instead of areas")
    split: SplitConfig = Field(default_factory=SplitConfig, description="train, validation and test")
    chips: ChipsConfig = Field(default_factory=ChipsConfig, description="how samples are cut")
    network: NetworkConfig = Field(default_factory=NetworkConfig, description="what is trained")
    loss: Annotated[str, AfterValidator(check_loss)] = Field(
        default="cross_entropy", description="a loss, or a sum such as 0.6*focal_tversky + 0.4*cross_entropy"
    )
    class_weights: Literal["none", "inverse_frequency", "inverse_samples", "effective_number"] = Field(
        default="none", description="how rare classes count for more in the loss"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="how the weights move")
    schedule: Literal["none", "plateau", "cosine", "one_cycle"] = Field(
        default="one_cycle", description="how the learning rate changes"
    )
    fit: FitConfig = Field(default_factory=FitConfig, description="how long and where it runs")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="how chips are varied")
    logs: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("csv", "tensorboard"), description="where the curves go"
    )
    tune: TuneConfig = Field(default_factory=TuneConfig, description="what s2seg tune tries beside these settings")

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the network's input channels: the bands, or ``band@season``, season by season."""
        if not self.seasons:
            return self.bands
        return tuple(f"{band}@{season}" for season in self.seasons for band in self.bands)

    @property
    def drop_codes(self) -> tuple[int, ...]:
        """Legend codes of ``chips.drop_only``."""
        return tuple(c.code for c in self.legend if c.name in self.chips.drop_only)

    def fingerprint(self, part: Literal["data", "all"] = "all") -> str:
        """Name what a configuration leads to: equal texts, equal results.

        Parameters
        ----------
        part
            ``data``: what decides the chips; ``all``: what decides the weights, which leaves out the name, the logs,
            ``tune`` and the machine. Paths count as they are resolved, so a moved file is another one.

        Returns
        -------
        str
            SHA-256 of the values as canonical JSON, 64 hexadecimal digits.
        """
        values = self.model_dump(mode="json", include=set(_DATA) if part == "data" else None, exclude=_BESIDE)
        values["seasons"] = list(self.seasons.items())  # their order is the channels'
        del values["chips"]["store"]  # where pixels are kept does not change them
        if part == "all":
            values["fit"] = {k: v for k, v in values["fit"].items() if k not in ("accelerator", "devices")}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return YAML with every value and resolved paths; :func:`load_config` reads it as the same configuration."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=120)

    @field_validator("bands")
    @classmethod
    def _bands_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for band in value:
            if band not in _OPTICAL:
                raise ValueError(f"unknown {band!r}: {_suggest(band, _OPTICAL)}")
            if value.count(band) > 1:
                raise ValueError(f"{band!r} is given twice")
        return value

    @field_validator("seasons")
    @classmethod
    def _seasons_are_words(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _SEASON_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not one word in small letters, such as summer")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if problems := [*self._check_areas(), *self._check_chips()]:
            raise ValueError("; ".join(problems))
        return self

    def _check_areas(self) -> Iterator[str]:
        if bool(self.areas) == bool(self.tiles):
            yield "areas: give either areas or tiles" + (", not both" if self.tiles else "")
        names = [area.name for area in self.areas]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"areas: two are called {name!r}; name them apart"
        if self.tiles and self.split.by != "blocks":
            yield f"split.by: tiles are split by fractions or by their sub-folders, not by {self.split.by}"
        if self.tiles and self.seasons:
            yield "seasons: tiles have no dates; list all their bands under bands"
        if self.tiles and self.augment.mixed_dates:
            yield "augment.mixed_dates: tiles have no dates; set it to 0"
        for i, area in enumerate(self.areas):
            yield from self._check_area(f"areas.{i}", area)
        parts = {area.split for area in self.areas}
        if self.areas and self.split.by == "area":
            for part in ("train", "validation"):
                if part not in parts:
                    yield f"areas: none has split: {part}, which split.by: area needs"

    def _check_area(self, where: str, area: AreaConfig) -> Iterator[str]:
        if (self.split.by == "area") != (area.split is not None):
            yield (
                f"{where}.split: say train, validation or test, because split.by is area"
                if area.split is None
                else f"{where}.split: counts only with split.by: area, but that is {self.split.by}"
            )

    def _check_chips(self) -> Iterator[str]:
        stride = self.network.stride
        if self.chips.size % stride:
            yield f"chips.size: {self.chips.size} is not a multiple of the network's stride {stride}"
        for size in self.tune.chip_sizes or ():
            if size % stride:
                yield f"tune.chip_sizes: {size} is not a multiple of the network's stride {stride}"
        if self.network.depth is not None and self.network.depth % stride:
            yield f"network.depth: {self.network.depth} is not a multiple of the network's stride {stride}"
        batch = self.fit.batch_size * len(self.channels) * self.chips.size**2 * 4
        if batch > _BATCH_BYTES:
            yield (
                f"fit.batch_size: the pixels of {self.fit.batch_size} chips alone take {batch / 2**30:.0f} GiB; use "
                "fewer, with fit.accumulate if the weights should move after many"
            )
        if len(self.legend) < 2:
            yield "legend: one class only; a segmentation model needs at least two"
        for name in self.chips.drop_only:
            if name not in self.legend.names:
                yield f"chips.drop_only: unknown {name!r}: {_suggest(name, self.legend.names)}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training configuration and check all of it.

    ``${NAME}`` and ``${NAME:-default}`` in values stand for environment variables. Relative paths count from the
    file's own folder. Whether data files exist is found out by their readers.

    Parameters
    ----------
    path
        A YAML file; ``s2seg train --template`` prints one.
    overrides
        Values that take the place of the file's, such as ``fit.epochs=3`` or ``areas.0.datetime=2021``; they are
        written as in YAML.

    Raises
    ------
    ConfigError
        Naming every key that is wrong, and how to mend it.
    """
    file = Path(path)
    values = _read(file)
    values.setdefault("name", file.stem)
    for override in overrides:
        _apply(override, values, str(path))
    try:
        return TrainConfig.model_validate(_expand(values, str(path)), context={"folder": file.absolute().parent})
    except ValidationError as error:
        raise ConfigError(str(path), _problems(error)) from error
    except RecursionError:
        raise ConfigError(str(path), ["is nested too deeply, or in itself"]) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file)
    except InputError as error:
        raise ConfigError(str(file), [str(error)]) from error
    if values is None:
        raise ConfigError(str(file), ["is empty; `s2seg train --template` prints one to start from"])
    if not isinstance(values, dict):
        what = "a list" if isinstance(values, list) else _shown(values)
        raise ConfigError(str(file), [f"holds {what}, not keys with values such as `bands: [red]`"])
    return values


def _apply(override: str, values: dict[str, Any], path: str) -> None:
    """Set one ``key.key=value`` in place."""
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(path, [f"cannot set {override!r}: write key=value, such as fit.epochs=3"])
    try:
        value = parse_yaml(text)
    except InputError as error:
        raise ConfigError(path, [f"cannot set {override!r}: the value {error}"]) from error
    inner: Any = values
    for step in parents:
        inner = _enter(inner, step, override, path)
    if isinstance(inner, list):
        inner[_index(inner, last, override, path)] = value
    elif isinstance(inner, dict):
        inner[last] = value
    else:
        raise ConfigError(path, [f"cannot set {override!r}: {'.'.join(parents)} is {inner!r}, not a section"])


def _enter(inner: Any, step: str, override: str, path: str) -> Any:
    if isinstance(inner, list):
        return inner[_index(inner, step, override, path)]
    if not isinstance(inner, dict):
        raise ConfigError(path, [f"cannot set {override!r}: {inner!r} has no key {step}"])
    if inner.get(step) is None:
        inner[step] = {}
    return inner[step]


def _index(items: list[Any], text: str, override: str, path: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise ConfigError(path, [f"cannot set {override!r}: {text!r} is none of the entries 0 to {len(items) - 1}"])
    return int(text)


def _expand(value: Any, path: str, where: str = "") -> Any:
    """Replace environment variables in all texts below ``value``."""
    if isinstance(value, Mapping):
        return {k: _expand(v, path, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, path, f"{where}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"]) or match["default"]
        if found is None:
            name = match["name"]
            hint = f"set it, or write ${{{name}:-default}}"
            raise ConfigError(path, [f"{where[1:]}: the environment has no {name}; {hint}"])
        return found

    return _VARIABLE.sub(replace, value)


_FORMS = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "mapping_type"), "keys with values"),
    **dict.fromkeys(("string_type", "invalid_key"), "text"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "is_instance_of": "a name, a file or keys with values",  # the legend
}
"""Pydantic's kinds of complaint about a value's type -> what the value should be, in the words of YAML."""

_LABELS: dict[str, type[BaseModel]] = {"<raster>": RasterLabelsConfig, "<vector>": VectorLabelsConfig}
_BRANCH = re.compile(r"(tuple|dict)\[.*|int|str")
"""How pydantic calls the forms that a value may take, where there are several."""


def _problems(error: ValidationError) -> list[str]:
    """Word all of pydantic's complaints, each once."""
    found = error.errors(include_url=False)
    # a list is short where its entries are wrong: those say why
    inner = {details["loc"][:-1] for details in found}
    told = [details for details in found if not (details["type"] == "too_short" and details["loc"] in inner)]
    return list(dict.fromkeys(_explain(details) for details in told))


def _explain(details: ErrorDetails) -> str:
    """Word one of pydantic's complaints as ``key: what is wrong and how to mend it``."""
    location = tuple(step for step in details["loc"] if str(step) not in (*_LABELS, "[key]"))
    forms = [i for i, step in enumerate(location) if _BRANCH.fullmatch(str(step))]
    if forms:  # it takes none of the forms that its help lists; what is wrong with each would tell less
        location = location[: forms[0]]
        text = f"makes no sense; the template says: {_help(location)}"
    else:
        text = _wording(details, details["loc"])
    where = ".".join(map(str, location))
    return f"{where}: {text}" if where else text


def _help(location: tuple[int | str, ...]) -> str:
    """What the schema says of the innermost key at a location."""
    names = [i for i, step in enumerate(location) if isinstance(step, str)]
    while names:
        last = names.pop()
        for model in _models_at(location[:last]):
            if field := model.model_fields.get(str(location[last])):
                return str(field.description)
    return "something else"


def _wording(details: ErrorDetails, location: tuple[int | str, ...]) -> str:
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return f"unknown key, {_suggest_key(str(location[-1]), location[:-1])}"
    if kind == "literal_error":
        known = re.findall("'([^']*)'", details["ctx"]["expected"])
        return f"unknown {_shown(given)}: {_suggest(str(given), known)}"
    if kind == "missing":
        return "is missing"
    if kind in ("value_error", "labels"):
        return str(details.get("ctx", {}).get("error", details["msg"]))
    if kind in ("too_short", "string_too_short"):
        return "is empty"
    if kind == "too_long":
        return f"should have {details['ctx']['max_length']} entries, not {len(given)}"
    form = _FORMS.get(kind)
    text = f"should be {form}" if form else details["msg"].replace("Input should", "should")
    return text if isinstance(given, Mapping | list | tuple) else f"{text}, not {_shown(given)}"


def _shown(value: Any) -> str:
    """A plain value as YAML writes it."""
    return repr(value) if isinstance(value, str) else str(yaml.safe_dump(value)).partition("\n")[0]


def _models_at(location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Sections that may stand at a location: labels are of a raster or of features."""
    models: list[type[BaseModel]] = [TrainConfig]
    for step in map(str, location):
        fields = [model.model_fields[step] for model in models if step in model.model_fields]
        if step in _LABELS:
            models = [_LABELS[step]]
        elif step == "composite":  # no model itself: it is validated as one
            models = [CompositeSection]
        elif fields:
            models = list(_sections(fields[0].annotation)) or models
    return models


def _suggest_key(name: str, location: tuple[int | str, ...]) -> str:
    """Name the key that was meant: the same one in the section where it belongs, or one like it here."""
    if not location:
        below = [
            (section, key)
            for section, field in TrainConfig.model_fields.items()
            for model in _sections(field.annotation)
            for key in model.model_fields
        ]
        same = [pair for pair in below if pair[1] == name]
        longer = [] if _longer(name, list(TrainConfig.model_fields)) else [p for p in below if _longer(name, p[1:])]
        if same or longer:
            return f"did you mean {'.'.join([*same, *longer][0])}?"
    return _suggest(name, tuple(_models_at(location)[0].model_fields))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models named anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = _longer(name, known) or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose {', '.join(known)}"


def _longer(name: str, known: Sequence[str]) -> list[str]:
    """Words of which only the beginning was written."""
    return [word for word in known if len(name) > 2 and word.startswith(name)]
