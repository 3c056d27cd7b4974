"""Every architecture, loss and schedule trains two steps on six bands, and maps a scene of awkward size."""

import inspect

import numpy as np
import odc.geo.xr
import pytest
import segmentation_models_pytorch as smp
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from s2seg import predict
from s2seg.errors import InputError, ModelError
from s2seg.models.bundle import save_bundle
from s2seg.training.chips import ChipSpec, write_chips
from s2seg.training.fit import check_fit, fit
from s2seg.training.sections import NetworkConfig
from tests.training.conftest import make_area
from tests.training.toy import LEGEND, toy_config

BANDS = ["blue", "green", "red", "nir", "swir16", "swir22"]
SMALL = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


def network(architecture, encoder="resnet18", **arguments):
    return {"network": {"architecture": architecture, "encoder": encoder, "arguments": arguments}}


def six_bands(**changes):
    fit = {"epochs": 1, "steps_per_epoch": 2, **changes.pop("fit", {})}
    return toy_config(bands=BANDS, chips={"size": 64, "stride": 64}, fit=fit, **changes)


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    rng = np.random.default_rng(0)
    labels = np.array(LEGEND.codes, np.uint8)[rng.integers(0, 3, (24, 24)).repeat(8, 0).repeat(8, 1)]
    split = np.ones((192, 192), np.uint8)
    split[:, 128:] = 2
    area = make_area(chunk=96, image=rng.integers(1, 4000, (6, 192, 192), np.uint16), labels=labels, split=split)
    path = tmp_path_factory.mktemp("six") / "chips.zarr"
    return write_chips([area], path, LEGEND, ChipSpec(64, 64), fingerprint="toy", bands=BANDS)


@pytest.mark.parametrize(
    ("changes", "stride", "window"),
    [
        (network("Unet", decoder_attention_type="scse", encoder_depth=3, decoder_channels=[32, 16, 16]), 8, 64),
        (network("UnetPlusPlus", **SMALL), 8, None),
        (network("MAnet", **SMALL), 8, 64),
        (network("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32), 32, 64),
        (network("DeepLabV3Plus", decoder_channels=32), 32, 64),
        (network("Segformer", "mit_b0"), 32, 64),
        (network("PSPNet"), 8, 64),  # three levels by default
        ({"loss": "0.5*lovasz + 0.5*focal_tversky", "class_weights": "effective_number"}, 8, None),
        ({"loss": "focal + 2*dice", "schedule": "plateau", "class_weights": "inverse_samples"}, 8, None),
    ],
    ids=lambda value: str(value)[:70] if isinstance(value, dict) else "",
)
def test_trains_and_maps(chips, tmp_path, changes, stride, window):
    result = fit(six_bands(**changes), chips, tmp_path)
    assert (result.spec.stride, result.spec.window) == (stride, window)
    bundle = save_bundle(tmp_path / "bundle", result.spec, result.network.state_dict())
    pixels = np.random.default_rng(1).integers(1, 4000, (6, 101, 75), np.uint16)
    coords = odc.geo.xr.xr_coords(GeoBox((101, 75), Affine(10, 0, 5e5, 0, -10, 5e6), "EPSG:32633"), dims=("y", "x"))
    scene = xr.DataArray(pixels, dims=("band", "y", "x"), coords=coords).assign_coords(band=BANDS).chunk()
    mapped = predict(scene, bundle, runtime="torch").land_cover
    assert mapped.shape == (101, 75)
    assert set(np.unique(mapped)) <= set(LEGEND.codes)


def test_levels_that_are_not_given_are_the_library_s():
    for name, architecture in smp.MODEL_ARCHITECTURES_MAPPING.items():
        default = inspect.signature(architecture).parameters["encoder_depth"].default
        assert NetworkConfig(architecture=name).levels == default, name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (network("PAN"), ModelError, "PAN with resnet18 takes no chips of 64 px .*: change chips.size"),
        (network("FPN", encoder_depth=3), ModelError, "FPN with resnet18 answers 64 px with 256: make encoder_depth"),
        (
            network("Unet", encoder_depth=3, decoder_channels=[32, 16, 8], decoder_attention_type="scse"),
            ModelError,
            r"Unet with resnet18: layer decoder\S*cSE\S* has no channels left: give decoder_channels of more",
        ),
        (network("Unet", encoder="resnet81"), ModelError, "did you mean resnet18"),
        ({"network": {"weights": "/nowhere/m"}}, ModelError, "/nowhere/m"),
        ({"fit": {"devices": 3}}, InputError, "fit.batch_size: 4 cannot be shared evenly by 3"),
    ],
)
def test_mistakes_show_before_data_are_read(changes, error, message):
    with pytest.raises(error, match=message):
        check_fit(six_bands(**changes))
