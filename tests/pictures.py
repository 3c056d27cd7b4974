"""Pictures that were written, read back."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.image import imread


def pixels(path: Path) -> npt.NDArray[np.int_]:
    """(y, x, 3) red, green and blue of a PNG, 0 to 255."""
    colors: npt.NDArray[np.int_] = (imread(path)[..., :3] * 255).round().astype(int)
    return colors
