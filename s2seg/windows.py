"""Chunk geometry: which pixels a block reads, which windows the network sees, which pixels are kept.

The only owner of these numbers. Everything is one axis at a time; both axes are alike. Positions count from the grid's
origin, and every window starts on a multiple of the network's stride from there, so that a map does not depend on how
it was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError


@dataclass(frozen=True)
class Span:
    """One window along one axis, in pixels from the start of the block's input.

    Parameters
    ----------
    start, stop
        What the network reads.
    """

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Pixels that the network reads."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The window as an index into the block's input."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ChunkSpec:
    """How a grid is cut into blocks, and blocks into network windows.

    Use :meth:`trimmed` or :meth:`blended`; the fields are their result.

    Parameters
    ----------
    core
        Output pixels on a side of a block.
    step
        Output pixels from one window to the next.
    before, after
        Context pixels that a block needs ahead of and behind its core.
    unit
        The grid is padded to a multiple of this: the stride, or the step of fixed windows.
    blend
        Whether neighbouring windows are averaged with a taper (True) or trimmed (False).
    """

    core: int
    step: int
    before: int
    after: int
    unit: int
    blend: bool

    @classmethod
    def trimmed(cls, core: int = 1024, step: int = 1024, depth: int = 64, stride: int = 32) -> ChunkSpec:
        """Windows of ``step + 2 * depth`` pixels of which ``depth`` on each side are thrown away.

        Raises
        ------
        InputError
            If a number is not a positive multiple of the stride, or the core not a multiple of the step.
        """
        for name, value, least in (("core", core, stride), ("step", step, stride), ("depth", depth, 0)):
            if value < least or value % stride:
                raise InputError(f"{name}={value} must be a multiple of the model's stride {stride}, at least {least}")
        if core % step or core < depth:
            raise InputError(f"core={core} must be a multiple of step={step} and at least depth={depth}")
        return cls(core=core, step=step, before=depth, after=depth, unit=stride, blend=False)

    @classmethod
    def blended(cls, core: int = 1024, window: int = 256, overlap: int = 64, stride: int = 32) -> ChunkSpec:
        """Windows of a fixed size that overlap and are averaged with a taper.

        The core is rounded down to whole steps of ``window - overlap`` pixels, so that the windows form one lattice
        over the whole grid and each belongs to the same place whatever the chunks are.

        Raises
        ------
        InputError
            If the overlap is not positive, exceeds half the window, or is no multiple of the stride.
        """
        if not 0 < overlap <= window // 2 or overlap % stride or window % stride:
            raise InputError(
                f"overlap={overlap} and window={window} must be multiples of the model's stride {stride}, "
                f"and the overlap at most half the window"
            )
        step = window - overlap
        return cls(core=max(core // step, 1) * step, step=step, before=overlap, after=step, unit=step, blend=True)

    @property
    def window(self) -> int:
        """Pixels on a side of a full window, as the network sees it."""
        return self.step + self.before if self.blend else self.step + self.before + self.after

    @property
    def overlap_cost(self) -> float:
        """Network pixels per output pixel in a full block (1 is free)."""
        return sum(s.size for s in self.spans(self.core)) ** 2 / self.core**2

    def padding(self, size: int) -> tuple[int, int]:
        """Pixels to add ahead of and behind an axis of ``size`` pixels: the context, and the ragged end."""
        return self.before, self.after + -size % self.unit

    def cores(self, size: int) -> tuple[int, ...]:
        """Output pixels of each block along an axis of ``size`` pixels; they add up to ``size``."""
        full, rest = divmod(size, self.core)
        return (self.core,) * full + ((rest,) if rest else ())

    def chunks(self, size: int) -> tuple[int, ...]:
        """Chunks of the padded axis: each block's core, with the padding on the first and the last one."""
        before, after = self.padding(size)
        sizes = list(self.cores(size))
        sizes[0] += before
        sizes[-1] += after
        return tuple(sizes)

    def spans(self, core: int) -> list[Span]:
        """Windows along one axis of a block whose core, padded to the unit, has ``core`` pixels."""
        if self.blend:
            return [Span(k * self.step, k * self.step + self.window) for k in range(core // self.step + 1)]
        context = self.before + self.after
        return [Span(s, min(s + self.step, core) + context) for s in range(0, core, self.step)]

    def windows(self, height: int, width: int) -> list[tuple[Span, Span]]:
        """All windows (rows, columns) of a block of ``height`` x ``width`` core pixels, padded to the unit."""
        return list(product(self.spans(height), self.spans(width)))

    def taper(self) -> npt.NDArray[np.float32]:
        """Blending weights (window, window) float32: a raised cosine over the overlap on each side, 1 within.

        The weights of all windows over a pixel add up to 1. Source: the Hann window's constant-overlap-add property
        (Harris 1978, doi:10.1109/PROC.1978.10837).
        """
        ramp = np.sin(0.5 * np.pi * (np.arange(self.before) + 0.5) / self.before) ** 2
        line = np.concatenate([ramp, np.ones(self.window - 2 * self.before), ramp[::-1]])
        return np.outer(line, line).astype(np.float32)
