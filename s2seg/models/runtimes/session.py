"""What every runtime offers."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Session(Protocol):
    """A network ready to run; safe to call from several threads."""

    @property
    def name(self) -> str:
        """Runtime, device and precision, such as ``openvino cpu float32``."""

    @property
    def parallel(self) -> int:
        """How many threads gain by calling at once.

        One where a call uses the whole device; on a GPU two, since the numbers of one batch cross while another
        computes.
        """

    def batch(self, height: int, width: int) -> int:
        """Return how many windows of this size, in pixels, suit one call; every number of them is answered."""

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """Map windows to what is stored.

        Parameters
        ----------
        windows
            Stored numbers (n, band, y, x) uint16, bands in the model's order, sides multiples of its stride.
        crop
            Pixels to drop on each side of the answer.
        layers
            What to return: ``class`` (n, y, x) legend codes; ``confidence`` (n, y, x), the highest probability,
            0 to 100; ``probability`` (n, class, y, x), 0 to 250.
        """

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Return (n, class, y, x) float32 that sums to 1 over the classes, for blending overlapping windows."""
