"""Chunk geometry: which pixels a block reads, which windows the network sees, which pixels are kept.

The only owner of these numbers. Pairs are (down, across). Positions count from the grid's origin, and every window
starts on a multiple of the network's stride from there, so that a map does not depend on how it was cut into chunks.
All windows of a map have one shape: a network is compiled once, and its buffers serve every window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError

Shape = tuple[int, int]
Margin = tuple[tuple[int, int], tuple[int, int]]
"""Pixels around an area: ((above, below), (left, right))."""

T = TypeVar("T")


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
        Output pixels of a block.
    step
        Output pixels from one window to the next.
    before, after
        Context pixels that a block needs ahead of and behind its core, on both axes.
    blend
        Whether neighbouring windows are averaged with a taper (True) or trimmed (False).
    """

    core: Shape
    step: Shape
    before: int
    after: int
    blend: bool

    @classmethod
    def trimmed(
        cls, core: int | Shape = 1024, depth: int = 64, stride: int = 32, shape: Shape | None = None
    ) -> ChunkSpec:
        """One window a block, ``2 * depth`` pixels larger than its core; ``depth`` on each side is thrown away.

        The grid is padded to whole blocks. With the ``shape`` of the grid, it is cut into as few blocks as ``core``
        allows, all alike, and the padding stays below one stride a block.

        Raises
        ------
        InputError
            If a number is no multiple of the stride, or the core smaller than the depth.
        """
        sides = (core, core) if isinstance(core, int) else core
        for name, value, least in (*(("core", n, max(stride, depth)) for n in sides), ("depth", depth, 0)):
            if value < least or value % stride:
                raise InputError(f"{name}={value} must be a multiple of the model's stride {stride}, at least {least}")
        if shape is not None:
            sides = _even(shape, sides, stride)
        return cls(core=sides, step=sides, before=depth, after=depth, blend=False)

    @classmethod
    def blended(
        cls, core: int = 1024, window: int = 256, overlap: int = 64, stride: int = 32, shape: Shape | None = None
    ) -> ChunkSpec:
        """Windows of a fixed size that overlap and are averaged with a taper.

        The core is rounded down to whole steps of ``window - overlap`` pixels, so that the windows form one lattice
        over the whole grid and each belongs to the same place whatever the chunks are. With the ``shape`` of the grid,
        it is cut into as few blocks as ``core`` allows, all alike.

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
        sides = (max(core // step, 1) * step,) * 2
        if shape is not None:
            sides = _even(shape, sides, step)
        return cls(core=sides, step=(step, step), before=overlap, after=step, blend=True)

    @property
    def window(self) -> Shape:
        """Pixels of a window, as the network sees it."""
        context = self.before if self.blend else self.before + self.after
        return self.step[0] + context, self.step[1] + context

    @property
    def overlap_cost(self) -> float:
        """Network pixels per output pixel in a whole block (1 is free)."""
        return self.cost(self.core)

    def cost(self, shape: Shape) -> float:
        """Network pixels per output pixel over a whole grid, its padding included (1 is free)."""

        def seen(size: int, axis: int) -> int:
            return sum(span.size for core in self._whole(size, axis) for span in self._spans(core, axis))

        down, across = _both(shape, seen)
        return down * across / (shape[0] * shape[1])

    def padding(self, shape: Shape) -> Margin:
        """Pixels to add around a grid: the context, and the ragged end."""
        return _both(shape, lambda n, i: (self.before, self.after + -n % self.step[i]))

    def cores(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Output pixels of the blocks along each axis; they add up to the grid's ``shape``."""
        return _both(shape, self._cores)

    def whole_cores(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The same before the ragged end is cut off."""
        return _both(shape, self._whole)

    def chunks(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Chunks of the padded grid: each block's core, with the padding on the first and the last one."""
        padding = self.padding(shape)

        def along(size: int, axis: int) -> tuple[int, ...]:
            sizes = list(self._cores(size, axis))
            sizes[0] += padding[axis][0]
            sizes[-1] += padding[axis][1]
            return tuple(sizes)

        return _both(shape, along)

    def windows(self, shape: Shape) -> list[tuple[Span, Span]]:
        """All windows (rows, columns) of a block whose core, made whole, has ``shape``."""
        return list(product(*_both(shape, self._spans)))

    def taper(self) -> npt.NDArray[np.float32]:
        """Blending weights of a window, float32: a raised cosine over the overlap on each side, 1 within.

        The weights of all windows over a pixel add up to 1. Source: the Hann window's constant-overlap-add property
        (Harris 1978, doi:10.1109/PROC.1978.10837).
        """
        ramp = np.sin(0.5 * np.pi * (np.arange(self.before) + 0.5) / self.before) ** 2
        down, across = (np.concatenate([ramp, np.ones(n - 2 * self.before), ramp[::-1]]) for n in self.window)
        return np.outer(down, across).astype(np.float32)

    def _cores(self, size: int, axis: int) -> tuple[int, ...]:
        full, rest = divmod(size, self.core[axis])
        return (self.core[axis],) * full + ((rest,) if rest else ())

    def _whole(self, size: int, axis: int) -> tuple[int, ...]:
        return tuple(n + -n % self.step[axis] for n in self._cores(size, axis))

    def _spans(self, core: int, axis: int) -> list[Span]:
        step, window = self.step[axis], self.window[axis]
        return [Span(k * step, k * step + window) for k in range(core // step + self.blend)]


def _both(shape: Shape, along: Callable[[int, int], T]) -> tuple[T, T]:
    """Call ``along(size, axis)`` for both axes."""
    return along(shape[0], 0), along(shape[1], 1)


def _even(shape: Shape, largest: Shape, unit: int) -> Shape:
    """The least multiples of ``unit`` that cover the shape in as few blocks as ``largest`` does."""
    down, across = (-(-n // (-(-n // most) * unit)) * unit for n, most in zip(shape, largest, strict=True))
    return down, across
