from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from s2seg.errors import InputError
from s2seg.windows import ChunkSpec

SPECS = [
    ChunkSpec.trimmed(core=256, depth=32),
    ChunkSpec.trimmed(core=(256, 288), depth=64),
    ChunkSpec.blended(core=400, window=128, overlap=32),
    ChunkSpec.blended(core=400, window=128, overlap=64),
]
SIZES = [1, 31, 32, 33, 255, 256, 257, 288, 300, 511, 512, 700, 1000]
SHAPES = list(zip(SIZES, reversed(SIZES), strict=True))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_is_covered_and_every_window_lies_in_the_padded_grid(
    spec: ChunkSpec, shape: tuple[int, int]
) -> None:
    (above, below), (left, right) = spec.padding(shape)
    weight = np.zeros((above + shape[0] + below, left + shape[1] + right))
    down, across = (np.cumsum([0, *cores]) for cores in spec.cores(shape))
    for (top, height), (start, width) in product(
        zip(down, spec.whole_cores(shape)[0], strict=False), zip(across, spec.whole_cores(shape)[1], strict=False)
    ):
        for rows, cols in spec.windows((height, width)):
            assert (top + rows.start - above) % 32 == 0 and (start + cols.start - left) % 32 == 0
            assert (rows.size, cols.size) == spec.window
            kept = np.zeros(weight.shape)
            view = kept[top + rows.start : top + rows.stop, start + cols.start : start + cols.stop]
            assert view.shape == spec.window, "the window lies in the padded grid"
            if spec.blend:
                view[:] = spec.taper()
            else:
                view[above : view.shape[0] - spec.after, left : view.shape[1] - spec.after] = 1
            # what lies outside this block's core belongs to the neighbour, who computes it again
            mine = np.zeros(weight.shape)
            mine[top + above : top + above + height, start + left : start + left + width] = kept[
                top + above : top + above + height, start + left : start + left + width
            ]
            weight += mine
    area = weight[above : above + shape[0], left : left + shape[1]]
    np.testing.assert_allclose(area, 1, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_add_up_to_the_padded_grid(spec: ChunkSpec, shape: tuple[int, int]) -> None:
    for axis in (0, 1):
        (before, after), size = spec.padding(shape)[axis], shape[axis]
        assert sum(spec.chunks(shape)[axis]) == before + size + after
        assert sum(spec.cores(shape)[axis]) == size
        assert len(spec.chunks(shape)[axis]) == len(spec.cores(shape)[axis])
        assert sum(spec.whole_cores(shape)[axis]) == size + after - spec.after


@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_grid_is_cut_into_blocks_that_are_all_alike(shape: tuple[int, int]) -> None:
    spec = ChunkSpec.trimmed(core=256, depth=32, shape=shape)
    for axis in (0, 1):
        whole = spec.whole_cores(shape)[axis]
        assert len(whole) == -(-shape[axis] // 256), "no more blocks than the core asks for"
        assert len(set(whole)) == 1 and whole[0] <= 256
        assert sum(whole) - shape[axis] < 32 * len(whole), "less than one stride a block is wasted"


def test_overlap_cost_is_what_the_design_says() -> None:
    assert ChunkSpec.trimmed(core=2048, depth=64).overlap_cost == pytest.approx(1.129, abs=1e-3)
    assert ChunkSpec.blended(core=1920, window=256, overlap=64).overlap_cost == pytest.approx((11 * 256 / 1920) ** 2)
    tile = (10980, 10980)
    spec = ChunkSpec.trimmed(core=2208, depth=64, shape=tile)
    assert spec.window == (2336, 2336)
    assert spec.cost(tile) == pytest.approx((5 * 2336 / 10980) ** 2)


@pytest.mark.parametrize(
    "arguments", [{"depth": 10}, {"core": 1000}, {"core": 0}, {"core": (512, 500)}, {"depth": 2048}]
)
def test_trimmed_refuses_geometry_that_breaks_alignment(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be a multiple"):
        ChunkSpec.trimmed(**arguments)


@pytest.mark.parametrize("overlap", [0, 50, 160])
def test_blended_refuses_geometry_that_breaks_the_lattice(overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        ChunkSpec.blended(window=256, overlap=overlap)
