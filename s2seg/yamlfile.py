"""YAML as people write it, read strictly: a key that is given twice is a mistake, not the value that comes last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from s2seg.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """Builds plain values only, and no mapping in which a key stands twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # asked here and not of the mapping that is built: there, merged keys (<<) look like repeated ones
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise InputError(f"gives {key.value!r} twice (line {key.start_mark.line + 1}); keep one of them")
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """Read one YAML document of plain values.

    Raises
    ------
    InputError
        For what is not YAML, is nested too deeply, or gives a key twice. Its text goes on after the name of the source:
        ``is not YAML: ...``.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise InputError(f"is not YAML: {' '.join(str(error.problem).split())}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2020-13-45 is a ValueError
        raise InputError(f"is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise InputError("is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises
    ------
    InputError
        As :func:`parse_yaml`, and for a file that cannot be read or is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not YAML: {error}") from error
    return parse_yaml(text)
