"""A commented configuration to start from, made from the schema: it cannot say what the schema does not."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from s2seg.training.config import TrainConfig
from s2seg.training.sections import AreaConfig, CompositeSection, RasterLabelsConfig, TilesConfig, VectorLabelsConfig

_WIDTH = 120
_COLUMN = 40
_HEAD = """\
A training run of s2seg: s2seg train THIS.yaml --output MODEL
Values shown are the defaults; what has none is an example. Relative paths count from this file's folder, and
${NAME:-default} stands for an environment variable; between other braces it needs quotes."""


def template() -> str:
    """Return a configuration as commented YAML, with every key; it loads as it is.

    Returns
    -------
    str
        Keys with their defaults, or an example where there is none, and their help as comments. What is an
        alternative to something else (tiles to areas, vector labels to a raster) is commented out.
    """
    lines = [*_comment(_HEAD), ""]
    for name, field in TrainConfig.model_fields.items():
        block = _block(name, field)
        # a blank line on both sides of a section
        gap = [""] if len(block) > 2 and lines[-1] else []
        lines += [*gap, *block, *([""] if len(block) > 2 else [])]
    return "\n".join(lines).rstrip() + "\n"


def _block(name: str, field: FieldInfo) -> list[str]:
    """Lines of one key of the whole configuration."""
    if name == "areas":
        return [_title(name, field), *_entry(_section(AreaConfig))]
    if name == "tiles":
        return _commented([_title(name, field), *_indented(_section(TilesConfig))])
    if section := _section_of(name, field):
        return [_title(name, field), *_indented(_section(section))]
    return _value(name, field)


def _section(model: type[BaseModel]) -> Iterator[str]:
    """Lines of a section's keys."""
    for name, field in model.model_fields.items():
        if name == "labels" and model is AreaConfig:
            yield f"{name}:"
            yield from _indented(_section(RasterLabelsConfig))
            yield "# or from features:"
            yield from _commented([f"{name}:", *_indented(_section(VectorLabelsConfig))])
        else:
            yield from _value(name, field)


def _section_of(name: str, field: FieldInfo) -> type[BaseModel] | None:
    if name == "composite":
        return CompositeSection
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _title(name: str, field: FieldInfo) -> str:
    return f"{name}:".ljust(_COLUMN) + f"# {field.description}"


def _value(name: str, field: FieldInfo) -> list[str]:
    """One key with its default or example, and its help beside it, or above where that is too long."""
    value = (
        field.examples[0] if field.is_required() and field.examples else field.get_default(call_default_factory=True)
    )
    text = f"{name}: {_flow('area' if field.is_required() and not field.examples else value)}"
    line = f"{text.ljust(_COLUMN - 1)} # {_help(field)}"
    return [line] if len(line) <= _WIDTH - 4 else [*_comment(_help(field)), text]


def _help(field: FieldInfo) -> str:
    choices = ", ".join(_choices(field.annotation))
    return f"{field.description} ({choices})" if choices else str(field.description)


def _choices(annotation: Any) -> Iterator[str]:
    """Words that a value, or each of a list of values, can be."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is not dict:
        for argument in get_args(annotation):
            yield from _choices(argument)


def _flow(value: Any) -> str:
    """Return a value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _indented(lines: Iterator[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _entry(lines: Iterator[str]) -> list[str]:
    """Make lines the one entry of a list."""
    first, *rest = lines
    return [f"  - {first}", *(f"    {line}" for line in rest)]


def _commented(lines: list[str]) -> list[str]:
    return [f"# {line}" for line in lines]


def _comment(text: str) -> list[str]:
    wrapped = (textwrap.wrap(line, _WIDTH - 6) for line in text.splitlines())
    return [f"# {part}" for parts in wrapped for part in parts]
