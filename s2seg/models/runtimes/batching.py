"""How many windows a network takes at once: few on a processor, on a GPU as many as make it faster, found by trial.

That serves blended models, and blocks that hold several windows. A trimmed block is one window, and nothing is tried.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s2seg.models.bundle import cache_folder

CACHED_PIXELS = 2**18
"""Pixels of a batch that suits a processor: larger ones leave its caches, and gain nothing."""

TRIALS = (1, 2, 4, 8, 16)
GAIN = 1.05
"""How much faster twice as many windows must be to be worth their memory."""

Seconds = Callable[[int, int, int], float | None]
"""What (windows, height, width) take, on all lanes of the device at once; None where it has no memory for them."""


def batch_for_caches(height: int, width: int) -> int:
    """Return how many windows of this size a processor takes at once."""
    return max(1, CACHED_PIXELS // (height * width))


def fastest_batch(seconds: Seconds, height: int, width: int) -> int:
    """Try more and more windows at once, until they are hardly faster or do not fit.

    Parameters
    ----------
    seconds
        Measures one trial.
    height, width
        Of a window, in pixels.
    """
    best, speed = TRIALS[0], 0.0
    for count in TRIALS:
        taken = seconds(count, height, width)
        if taken is None or count / taken < GAIN * speed:
            break
        best, speed = count, count / taken
    return best


class MeasuredBatches:
    """What was found by trial, kept for this process and, in ``S2SEG_CACHE``, for the next ones.

    A batch of another size may take another path through the GPU's library, whose sums differ in the last digit: with
    the number kept, a map that is made again on the same machine is made in the same way.

    Parameters
    ----------
    sha256
        Digest of the model.
    conditions
        All else that a figure depends on: the device's name, the library's version, the precision, and how many batches
        run at once.
    seconds
        Measures one trial.
    """

    def __init__(self, sha256: str, conditions: str, seconds: Seconds) -> None:
        self._file = cache_folder("batches") / f"{sha256[:32]}.json"
        self._conditions, self._seconds = conditions, seconds
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, height: int, width: int) -> int:
        """Return how many windows of this size to take at once; the first call measures, and others wait for it."""
        shape = f"{height}x{width}"
        with self._lock:
            if shape not in self._known:
                self._known.update(_counts(_read(self._file).get(self._conditions)))
            if shape not in self._known:
                self._known[shape] = fastest_batch(self._seconds, height, width)
                self._keep()
            return self._known[shape]

    def _keep(self) -> None:
        kept = _read(self._file)
        kept[self._conditions] = _counts(kept.get(self._conditions)) | self._known
        # where the folder cannot be written, the next process measures again
        with contextlib.suppress(OSError):
            _replace(self._file, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _read(file: Path) -> dict[str, Any]:
    """Return what was kept; a file that is missing or damaged counts for nothing."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _counts(kept: Any) -> dict[str, int]:
    return {shape: n for shape, n in kept.items() if n in TRIALS} if isinstance(kept, dict) else {}


def _replace(file: Path, text: str) -> None:
    """Write a file that another process may read meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as scratch:
        new = Path(scratch) / "new"
        new.write_text(text)
        new.replace(file)
