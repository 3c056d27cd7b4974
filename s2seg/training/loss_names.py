"""The losses by name, and the small language that mixes them; free of torch, so that a config can check it."""

from __future__ import annotations

import difflib
import math
import re

from s2seg.errors import InputError

LOSSES = ("cross_entropy", "dice", "focal", "focal_tversky", "tversky", "lovasz")
"""What :func:`s2seg.training.losses.build_loss` can build."""

_TERM = re.compile(r"(?:(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?(?P<name>[A-Za-z_]\w*)")
_EXAMPLE = "write one name or a weighted sum, such as 0.6*focal_tversky + 0.4*cross_entropy"


def parse_loss(text: str) -> tuple[tuple[float, str], ...]:
    """Read a loss such as ``cross_entropy`` or ``0.6*focal_tversky + 0.4*cross_entropy``.

    Parameters
    ----------
    text
        Names of :data:`LOSSES` joined by ``+``, each with an optional positive factor before a ``*``.

    Returns
    -------
    tuple of (float, str)
        Factor (1 where none is written) and name of each term, in the order of the text.

    Raises
    ------
    InputError
        For an unknown name, with those that are nearest; for anything else that is not such a sum; for a factor
        that is not positive; for a name that is given twice.
    """
    terms: list[tuple[float, str]] = []
    # the + of an exponent (1e+2) joins nothing
    for part in re.split(r"(?<![0-9.][eE])\+", text):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise InputError(f"loss {text!r}: {part.strip()!r} is not understood; {_EXAMPLE}")
        name = match["name"]
        if name not in LOSSES:
            raise InputError(f"loss {text!r}: unknown loss {name!r}{_nearest(name)}")
        if name in (known for _, known in terms):
            raise InputError(f"loss {text!r}: {name} is given twice; add up its factors")
        terms.append((_factor(match["weight"], text), name))
    return tuple(terms)


def _factor(weight: str | None, text: str) -> float:
    if weight is None:
        return 1.0
    try:
        factor = float(weight)
    except ValueError as error:
        raise InputError(f"loss {text!r}: {weight!r} is not a number; {_EXAMPLE}") from error
    if not (factor > 0 and math.isfinite(factor)):
        raise InputError(f"loss {text!r}: the factor {weight} is not a positive number; {_EXAMPLE}")
    return factor


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), LOSSES, n=2, cutoff=0.5)
    hint = f": did you mean {' or '.join(close)}?" if close else ";"
    return f"{hint} There are {', '.join(LOSSES)}"
