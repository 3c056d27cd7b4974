"""What is said of a network that sees its whole window where its bundle says that it does not."""

from __future__ import annotations

import warnings

from s2seg.errors import S2SegWarning


def warn_of_seams(path: str) -> None:
    """Warn that the bundle at ``path`` will be trimmed where it ought to be blended."""
    warnings.warn(
        f"model {path}: the network sees its whole window, but global_context is false: expect seams "
        "between blocks; save the bundle with global_context=True",
        S2SegWarning,
        stacklevel=3,
    )
