from __future__ import annotations

import numpy as np
import pytest

from s2seg.errors import InputError
from s2seg.windows import ChunkSpec

SPECS = [
    ChunkSpec.trimmed(core=256, step=128, depth=32),
    ChunkSpec.trimmed(core=256, step=256, depth=64),
    ChunkSpec.blended(core=400, window=128, overlap=32),
    ChunkSpec.blended(core=400, window=128, overlap=64),
]
SIZES = [1, 31, 32, 33, 255, 256, 257, 288, 300, 511, 512, 700, 1000]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_is_covered_and_every_window_lies_in_the_padded_axis(spec: ChunkSpec, size: int) -> None:
    before, after = spec.padding(size)
    padded = before + size + after
    weight = np.zeros(padded)
    taper = np.sqrt(np.diag(spec.taper())) if spec.blend else None
    start = 0
    starts = []
    for core in spec.cores(size):
        whole = core + -core % spec.unit
        for span in spec.spans(whole):
            assert start + span.stop <= padded
            starts.append(start + span.start - before)
            kept = np.zeros(padded)
            if taper is not None:
                kept[start + span.start : start + span.stop] = taper
            else:
                kept[start + span.start + spec.before : start + span.stop - spec.after] = 1
            # what lies outside this block's core belongs to the neighbour, who computes it again
            kept[: start + before] = 0
            kept[start + before + core :] = 0
            weight += kept
        start += core
    np.testing.assert_allclose(weight[before : before + size], 1, atol=1e-6)
    assert all(s % 32 == 0 for s in starts), "windows start on the network's stride, from the grid's origin"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SIZES)
def test_chunks_add_up_to_the_padded_axis(spec: ChunkSpec, size: int) -> None:
    before, after = spec.padding(size)
    assert sum(spec.chunks(size)) == before + size + after
    assert sum(spec.cores(size)) == size
    assert len(spec.chunks(size)) == len(spec.cores(size))
    assert (size + after - spec.after) % spec.unit == 0


def test_overlap_cost_is_what_the_design_says() -> None:
    assert ChunkSpec.trimmed(core=2048, step=2048, depth=64).overlap_cost == pytest.approx(1.129, abs=1e-3)
    assert ChunkSpec.trimmed(core=1024, step=512, depth=64).overlap_cost == pytest.approx(1.5625)
    assert ChunkSpec.blended(core=1920, window=256, overlap=64).overlap_cost == pytest.approx((11 * 256 / 1920) ** 2)


@pytest.mark.parametrize(
    "arguments", [{"depth": 10}, {"core": 1000}, {"step": 0}, {"core": 512, "step": 384}, {"depth": 2048}]
)
def test_trimmed_refuses_geometry_that_breaks_alignment(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be a multiple"):
        ChunkSpec.trimmed(**arguments)


@pytest.mark.parametrize("overlap", [0, 50, 160])
def test_blended_refuses_geometry_that_breaks_the_lattice(overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        ChunkSpec.blended(window=256, overlap=overlap)
