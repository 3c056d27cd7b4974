"""Whether a GPU can be there, told without loading a library that would use it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What Linux shows where there is a driver for NVIDIA's or AMD's GPUs, or WSL's for either."""


def may_have_gpu() -> bool:
    """Return False where no driver for a GPU can be there, or the environment hides every GPU from this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if sys.platform == "darwin":
        return False
    return sys.platform != "linux" or any(Path(driver).exists() for driver in _GPU_DRIVERS)
