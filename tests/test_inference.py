from __future__ import annotations

from functools import partial

import dask
import dask.array as da
import numpy as np
import odc.geo.xr
import onnxruntime
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage

from s2seg import inference
from s2seg.errors import InputError, MissingBandError
from s2seg.inference import chunks_for
from s2seg.models.bundle import ModelBundle
from s2seg.windows import ChunkSpec
from tests.tiny import LEGEND, tiny_onnx

predict = partial(inference.predict, runtime="onnxruntime")  # whose answers are the oracle here

BANDS = ("blue", "green", "red", "nir")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fixed_model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("fixed"), window=128)


def make_scene(height: int, width: int, holes: bool = False, seed: int = 0) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    pixels = ndimage.gaussian_filter(rng.normal(0, 1, (4, height, width)), (0, 2, 2), mode="reflect")
    pixels = np.clip(1000 + 3000 * pixels / pixels.std(), 1, 9000).astype(np.uint16)
    if holes:
        pixels[:, :, : width // 3] = 0
        pixels[1, height // 2, width // 2] = 0
    grid = GeoBox((height, width), Affine(10, 0, 500000, 0, -10, 5100000), "EPSG:32633")
    coords = odc.geo.xr.xr_coords(grid, dims=("y", "x"))
    scene = xr.DataArray(da.from_array(pixels, chunks=(4, 50, 70)), dims=("band", "y", "x"), coords=coords)
    return scene.assign_coords(band=list(BANDS))


def whole_image(model: ModelBundle, pixels: np.ndarray, margin: int = 32) -> np.ndarray:
    """The oracle: the network once, over the whole image with a reflected margin; probabilities (class, y, x)."""
    session = onnxruntime.InferenceSession(str(model.weights_path))
    height, width = pixels.shape[1:]
    padded = np.pad(pixels, [(0, 0), (margin, margin + -height % 32), (margin, margin + -width % 32)], mode="symmetric")
    logits = session.run(None, {"input": ((padded[None] * 1e-4 - 0.1) / 0.1).astype(np.float32)})[0][0]
    e = np.exp(logits - logits.max(axis=0))
    return (e / e.sum(axis=0))[:, margin : margin + height, margin : margin + width]


@pytest.mark.parametrize("size", [(320, 320), (300, 411), (129, 500), (33, 20), (1, 1)])
@pytest.mark.parametrize("core", [128, 256])
def test_chunked_prediction_is_the_whole_image_prediction(model: ModelBundle, size: tuple[int, int], core: int) -> None:
    scene = make_scene(*size)
    chunks = ChunkSpec.trimmed(core=core, depth=32)
    got = predict(scene, model, layers=("class", "confidence", "probability"), chunks=chunks)
    expected = whole_image(model, scene.values)
    np.testing.assert_array_equal(got.land_cover.values, LEGEND.channel_to_code()[expected.argmax(axis=0)])
    np.testing.assert_allclose(got.confidence.values, 100 * expected.max(axis=0), atol=0.51)
    np.testing.assert_allclose(got.probability.values, 250 * expected, atol=0.51)
    assert got.land_cover.dtype == got.confidence.dtype == got.probability.dtype == np.uint8
    assert got.odc.geobox == scene.odc.geobox
    assert got["class"].values.tolist() == list(LEGEND.names)


def test_the_answer_does_not_depend_on_chunks_or_scheduler(model: ModelBundle, fixed_model: ModelBundle) -> None:
    scene = make_scene(300, 411, holes=True)
    for bundle, specs in (
        (model, [ChunkSpec.trimmed(core=c, depth=32) for c in (64, (96, 128), 512)]),
        (fixed_model, [ChunkSpec.blended(core=c, window=128, overlap=32) for c in (96, 192, 480)]),
    ):
        maps = [predict(scene, bundle, chunks=spec, layers=("class", "confidence")) for spec in specs]
        with dask.config.set(scheduler="synchronous"):
            first = maps[0].compute()
        for other in maps[1:]:
            with dask.config.set(scheduler="threads", num_workers=4):
                xr.testing.assert_identical(first, other.compute())


def test_blending_averages_windows_by_their_taper(fixed_model: ModelBundle) -> None:
    scene = make_scene(200, 200)
    spec = ChunkSpec.blended(core=96, window=128, overlap=32)
    got = predict(scene, fixed_model, layers=("probability",), chunks=spec).probability.values
    # the oracle: windows on the lattice from the origin, each weighted by a raised cosine of its own
    (before, after), across = spec.padding((200, 200))
    padded = np.pad(scene.values, [(0, 0), (before, after), across], mode="symmetric")
    line = np.minimum(np.arange(128) + 0.5, 128 - np.arange(128) - 0.5)
    line = np.where(line < 32, np.sin(np.pi / 2 * np.minimum(line, 32) / 32) ** 2, 1)
    session = onnxruntime.InferenceSession(str(fixed_model.weights_path))
    total, weight = np.zeros((3, *padded.shape[1:])), np.zeros(padded.shape[1:])
    for y in range(0, padded.shape[1] - 127, 96):
        for x in range(0, padded.shape[2] - 127, 96):
            window = padded[None, :, y : y + 128, x : x + 128]
            logits = session.run(None, {"input": ((window * 1e-4 - 0.1) / 0.1).astype(np.float32)})[0][0]
            e = np.exp(logits - logits.max(axis=0))
            total[:, y : y + 128, x : x + 128] += e / e.sum(axis=0) * np.outer(line, line)
            weight[y : y + 128, x : x + 128] += np.outer(line, line)
    expected = (total / np.maximum(weight, 1e-9))[:, before : before + 200, before : before + 200]
    np.testing.assert_allclose(got, 250 * expected, atol=0.51)


def test_a_real_margin_replaces_reflection(model: ModelBundle) -> None:
    scene = make_scene(400, 400)
    spec = ChunkSpec.trimmed(core=128, depth=32, shape=(200, 150))
    (above, below), (left, right) = spec.padding((200, 150))
    area = scene.isel(y=slice(100, 300), x=slice(120, 270))
    wide = scene.isel(y=slice(100 - above, 300 + below), x=slice(120 - left, 270 + right))
    got = predict(wide, model, chunks=spec, margin=((above, below), (left, right)))
    assert got.odc.geobox == area.odc.geobox
    expected = LEGEND.channel_to_code()[whole_image(model, scene.values).argmax(axis=0)]
    np.testing.assert_array_equal(got.land_cover.values, expected[100:300, 120:270])
    reflected = predict(area, model, chunks=spec).land_cover.values
    assert (reflected != got.land_cover.values).any(), "the margin makes a difference at the border"


def test_nodata_in_is_nodata_out_and_empty_windows_never_reach_the_network(
    model: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(320, 320, holes=True)
    seen: list[np.ndarray] = []
    from s2seg.models.runtimes import onnxrt

    original = onnxrt.OnnxSession.classify
    monkeypatch.setattr(
        onnxrt.OnnxSession,
        "classify",
        lambda self, windows, *rest: seen.append(windows) or original(self, windows, *rest),
    )
    got = predict(scene, model, layers=("class", "confidence"), chunks=ChunkSpec.trimmed(core=64, depth=32)).compute()
    invalid = (scene.values == 0).any(axis=0)
    np.testing.assert_array_equal(got.land_cover.values == LEGEND.nodata, invalid)
    np.testing.assert_array_equal(got.confidence.values == 255, invalid)
    assert seen and all((w[32:-32, 32:-32] != 0).any() for batch in seen for w in batch.all(axis=1))
    assert sum(len(batch) for batch in seen) == 4 * 5 - 0, "the first column of blocks is empty"


def test_dates_are_kept_apart(model: ModelBundle) -> None:
    scenes = [make_scene(100, 120, seed=s) for s in (1, 2)]
    both = xr.concat(scenes, dim=xr.DataArray(np.array(["2023-08-10", "2023-08-15"], "datetime64[ns]"), dims="time"))
    got = predict(both, model, layers=("class", "probability"))
    assert got.land_cover.dims == ("time", "y", "x") and got.probability.dims == ("time", "class", "y", "x")
    for i, scene in enumerate(scenes):
        np.testing.assert_array_equal(got.land_cover[i].values, predict(scene, model).land_cover.values)


def test_observations_travel_along_and_bands_are_found_by_name(model: ModelBundle) -> None:
    scene = make_scene(100, 100)
    looks = xr.DataArray(da.full((100, 100), 3, dtype=np.uint16), dims=("y", "x"))
    shuffled = scene.isel(band=[2, 3, 0, 1]).assign_coords(observations=looks)
    got = predict(shuffled, model)
    assert (got.observations.values == 3).all()
    np.testing.assert_array_equal(got.land_cover.values, predict(scene, model).land_cover.values)


def test_nothing_is_computed_before_it_is_asked_for(model: ModelBundle) -> None:
    def explode(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed too early")

    scene = make_scene(300, 300)
    lazy = scene.copy(data=scene.data.map_blocks(explode, dtype=np.uint16, meta=np.empty((0, 0, 0), np.uint16)))
    predict(lazy, model, layers=("class", "probability"))


def test_bad_requests_are_told_apart(model: ModelBundle) -> None:
    scene = make_scene(64, 64)
    with pytest.raises(MissingBandError, match="nir"):
        predict(scene.isel(band=[0, 1, 2]), model)
    with pytest.raises(InputError, match="unknown layer 'logits'"):
        predict(scene, model, layers=("class", "logits"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choose among"):
        predict(scene, model, layers=())
    with pytest.raises(InputError, match=r"no spatial_ref: .*write_crs"):
        predict(scene.drop_vars("spatial_ref"), model)
    with pytest.raises(InputError, match="no band"):
        predict(scene.isel(band=0), model)
    with pytest.raises(InputError, match=r"64 pixels along x: no room for a margin of \(40, 30\)"):
        predict(scene, model, margin=((0, 0), (40, 30)))


def test_fixed_and_global_networks_are_blended(model: ModelBundle, fixed_model: ModelBundle) -> None:
    assert not chunks_for(model).blend
    assert chunks_for(fixed_model).blend and chunks_for(fixed_model).window == (128, 128)
