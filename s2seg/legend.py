"""What the codes of a land-cover map mean: one object for palettes, CF flags, STAC classes and training alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError
from s2seg.yamlfile import read_yaml

_COLOR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class LandClass:
    """One class of a legend.

    Parameters
    ----------
    code
        The stored value, 0 to 255.
    name
        What people call it.
    color
        ``#rrggbb``.
    """

    code: int
    name: str
    color: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):  # YAML takes no for False and 2021 for a number
            raise InputError(f"class {self.code!r}: its name {self.name!r} is not text; write it in quotes")
        if not isinstance(self.code, int) or isinstance(self.code, bool) or not 0 <= self.code <= 255:
            raise InputError(f"class {self.name!r}: code {self.code!r} is not a whole number from 0 to 255")
        if not isinstance(self.color, str) or not _COLOR.fullmatch(self.color):
            # without quotes, YAML takes what follows # for a comment
            raise InputError(f"class {self.name!r}: color {self.color!r} is not of the form '#rrggbb', in quotes")

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        return int(self.color[1:3], 16), int(self.color[3:5], 16), int(self.color[5:7], 16)


@dataclass(frozen=True)
class Legend:
    """The classes of a map, in the order of a model's output channels, and the code for "no data".

    Channel ``i`` of a network means ``legend.codes[i]``. Nodata is a code of its own, never a class.

    Parameters
    ----------
    name
        A short name, such as ``worldcover``.
    classes
        At least one class; codes and names are unique.
    nodata
        The stored value of pixels without an answer.
    source
        Where the definition comes from (a URL or a citation).

    Raises
    ------
    InputError
        For codes or names that repeat, or a nodata code that is also a class.
    """

    name: str
    classes: tuple[LandClass, ...]
    nodata: int = 0
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise InputError(f"legend {self.name!r} has no classes")
        if not isinstance(self.nodata, int) or isinstance(self.nodata, bool) or not 0 <= self.nodata <= 255:
            raise InputError(f"legend {self.name!r}: nodata {self.nodata!r} is not a whole number from 0 to 255")
        for what, values in (("code", self.codes), ("name", self.names)):
            repeated = sorted({v for v in values if values.count(v) > 1}, key=str)
            if repeated:
                raise InputError(f"legend {self.name!r}: {what} {repeated[0]!r} is given twice")
        if self.nodata in self.codes:
            raise InputError(
                f"legend {self.name!r}: nodata {self.nodata} is also the class {self[self.nodata].name!r}; "
                "set nodata to an unused code, such as 255"
            )

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[LandClass]:
        # spelled out, because Python would otherwise count codes up from 0 with __getitem__
        return iter(self.classes)

    def __getitem__(self, code: int) -> LandClass:
        for c in self.classes:
            if c.code == code:
                return c
        raise KeyError(code)

    @property
    def codes(self) -> tuple[int, ...]:
        """Stored values, in channel order."""
        return tuple(c.code for c in self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, in channel order."""
        return tuple(c.name for c in self.classes)

    @property
    def colors(self) -> tuple[str, ...]:
        """``#rrggbb``, in channel order."""
        return tuple(c.color for c in self.classes)

    def colormap(self) -> dict[int, tuple[int, int, int, int]]:
        """Palette for a GeoTIFF: code -> (red, green, blue, alpha); nodata is transparent."""
        return {self.nodata: (0, 0, 0, 0)} | {c.code: (*c.rgb, 255) for c in self.classes}

    def channel_to_code(self) -> npt.NDArray[np.uint8]:
        """Look-up table (channels,) uint8: ``table[argmax]`` is the stored code."""
        return np.array(self.codes, dtype=np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to YAML and ``model.json``."""
        return {
            "name": self.name,
            "nodata": self.nodata,
            **({"source": self.source} if self.source else {}),
            "classes": [{"code": c.code, "name": c.name, "color": c.color} for c in self.classes],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "legend") -> Legend:
        """Build from :meth:`to_dict`'s form.

        Parameters
        ----------
        values
            ``name``, ``nodata`` (0 if absent), ``source`` and ``classes``, a list of ``code``, ``name``, ``color``.
        where
            What to call the source in an error.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("classes"), Iterable):
            raise InputError(f"{where}: a legend needs a list `classes` of code, name and color")
        try:
            classes = tuple(LandClass(code=c["code"], name=c["name"], color=c["color"]) for c in values["classes"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: each class needs code, name and color ({error})") from error
        return cls(
            name=str(values.get("name", where)),
            classes=classes,
            nodata=values.get("nodata", 0),
            source=str(values.get("source", "")),
        )

    @classmethod
    def load(cls, name_or_path: str | Path) -> Legend:
        """Return a built-in legend by name, or read one from a YAML file.

        Raises
        ------
        InputError
            For a name that is neither built in nor a readable YAML file; it lists the built-in names.
        """
        if str(name_or_path) in BUILTIN:
            return BUILTIN[str(name_or_path)]
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"unknown legend {str(name_or_path)!r}: give a YAML file or one of {', '.join(BUILTIN)}")
        try:
            values = read_yaml(path)
        except InputError as error:
            raise InputError(f"legend {path} {error}") from error
        if isinstance(values, Mapping):
            values = {"name": path.stem, **values}
        return cls.from_dict(values, where=str(path))


def _legend(name: str, source: str, *classes: tuple[int, str, str], nodata: int = 0) -> Legend:
    return Legend(name, tuple(LandClass(*c) for c in classes), nodata=nodata, source=source)


_CORINE_1 = (
    (1, "artificial surfaces", "#e6004d"),
    (2, "agricultural areas", "#ffffa8"),
    (3, "forest and semi-natural areas", "#80ff00"),
    (4, "wetlands", "#a6a6ff"),
    (5, "water bodies", "#00ccf2"),
)
_CORINE_2 = (
    (11, "urban fabric", "#e6004d"),
    (12, "industrial, commercial and transport units", "#cc4df2"),
    (13, "mine, dump and construction sites", "#a600cc"),
    (14, "artificial, non-agricultural vegetated areas", "#ffa6ff"),
    (21, "arable land", "#ffffa8"),
    (22, "permanent crops", "#e68000"),
    (23, "pastures", "#e6e64d"),
    (24, "heterogeneous agricultural areas", "#ffe6a6"),
    (31, "forests", "#80ff00"),
    (32, "scrub and/or herbaceous vegetation associations", "#ccf24d"),
    (33, "open spaces with little or no vegetation", "#e6e6e6"),
    (41, "inland wetlands", "#a6a6ff"),
    (42, "maritime wetlands", "#ccccff"),
    (51, "inland waters", "#00ccf2"),
    (52, "marine waters", "#00ffa6"),
)

BUILTIN: dict[str, Legend] = {
    legend.name: legend
    for legend in (
        _legend(
            "worldcover",
            "ESA WorldCover 2021 v200, product user manual",
            (10, "tree cover", "#006400"),
            (20, "shrubland", "#ffbb22"),
            (30, "grassland", "#ffff4c"),
            (40, "cropland", "#f096ff"),
            (50, "built-up", "#fa0000"),
            (60, "bare / sparse vegetation", "#b4b4b4"),
            (70, "snow and ice", "#f0f0f0"),
            (80, "permanent water bodies", "#0064c8"),
            (90, "herbaceous wetland", "#0096a0"),
            (95, "mangroves", "#00cf75"),
            (100, "moss and lichen", "#fae6a0"),
        ),
        _legend(
            "dynamic-world",
            "Brown et al. 2022, Dynamic World, doi:10.1038/s41597-022-01307-4",
            (0, "water", "#419bdf"),
            (1, "trees", "#397d49"),
            (2, "grass", "#88b053"),
            (3, "flooded vegetation", "#7a87c6"),
            (4, "crops", "#e49635"),
            (5, "shrub and scrub", "#dfc35a"),
            (6, "built", "#c4281b"),
            (7, "bare", "#a59b8f"),
            (8, "snow and ice", "#b39fe1"),
            nodata=255,
        ),
        _legend(
            "esri",
            "Esri / Impact Observatory 10 m annual land use land cover, nine classes",
            (1, "water", "#419bdf"),
            (2, "trees", "#397d49"),
            (4, "flooded vegetation", "#7a87c6"),
            (5, "crops", "#e49635"),
            (7, "built area", "#c4281b"),
            (8, "bare ground", "#a59b8f"),
            (9, "snow/ice", "#a8ebff"),
            (10, "clouds", "#616161"),
            (11, "rangeland", "#e3e2c3"),
        ),
        _legend("corine-1", "CORINE Land Cover nomenclature, level 1", *_CORINE_1),
        _legend("corine-2", "CORINE Land Cover nomenclature, level 2", *_CORINE_2),
    )
}
"""Legends by name: what published maps use, with their codes and colours."""
