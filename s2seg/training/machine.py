"""Where a training runs, and what of this process it leaves as it was."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from s2seg.errors import InputError
from s2seg.training.config import TrainConfig

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # Lightning 2.6 asks torch 2.14 in a way that goes out of use
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
)


def machine(config: TrainConfig) -> dict[str, Any]:
    """Return the Trainer's arguments about the machine.

    Raises
    ------
    InputError
        For a device or a precision that is not there, or a batch that the devices cannot share.
    """
    settings = config.fit
    kind = settings.accelerator
    if kind == "auto":
        kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind == "gpu" and torch.cuda.device_count() < settings.devices:
        raise InputError(
            f"fit.devices: {settings.devices} GPUs are asked for, torch sees {torch.cuda.device_count()}; "
            "set fit.accelerator to cpu, or fit.devices lower"
        )
    if kind == "mps" and settings.devices > 1:
        raise InputError(f"fit.devices: there is one mps device, not {settings.devices}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("fit.accelerator: torch sees no mps device here; set it to auto")
    if settings.precision == "float16" and kind != "gpu":
        raise InputError("fit.precision: float16 needs a GPU; use auto, bfloat16 or float32")
    if settings.batch_size % settings.devices:
        raise InputError(f"fit.batch_size: {settings.batch_size} cannot be shared evenly by {settings.devices} devices")
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if _fast_bfloat16(kind) else "float32"
    return {
        "accelerator": kind,
        "devices": settings.devices,
        "precision": _PRECISIONS[precision],
        # a GPU has no deterministic form of cross entropy over pixels
        "deterministic": kind == "cpu",
    }


def _fast_bfloat16(kind: str) -> bool:
    """Whether bfloat16 is faster than float32 here: on most CPUs it is emulated."""
    if kind == "gpu":
        return torch.cuda.is_bf16_supported(False)
    abilities = torch.cpu.get_capabilities()
    return kind == "cpu" and bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))


@contextmanager
def reproducible() -> Iterator[None]:
    """Leave torch's chance and its settings for determinism as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    # filling every new buffer with NaN finds bugs, and costs a pass over all memory
    memory.fill_uninitialized_memory = False
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = fill


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Ctrl-C as what it is, where Lightning ends the program and leaves it deaf to any further one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning from advertising and from telling about devices; warnings pass, but for what it cannot know."""
    loggers = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning", "mlflow", "alembic")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message, category in _NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
