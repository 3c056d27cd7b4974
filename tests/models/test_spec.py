import json
import math

import jsonschema
import numpy as np
import pystac
import pytest
from pystac.extensions.mlm import MLMExtension
from pystac.validation.local_validator import get_local_schema_cache
from referencing import Registry, Resource

from s2seg.errors import InputError
from s2seg.legend import BUILTIN, LandClass, Legend
from s2seg.models import ModelSpec

SHA = "0" * 64


def test_affine_is_the_scaling_in_one_step(spec):
    a, b = spec.affine()
    dn = np.array([0, 1, 2500, 65535])
    for i in range(4):
        np.testing.assert_allclose(dn * a[i] + b[i], (dn * 1e-4 - spec.mean[i]) / spec.std[i], rtol=1e-5, atol=1e-5)


def test_numpy_statistics_become_plain_numbers(other_spec):
    made = other_spec(mean=np.float32([0.5, 0.25, 0.125, 1]), std=list(np.ones(4)), bands=["a", "b", "c", "d"])
    assert made.mean == (0.5, 0.25, 0.125, 1.0)
    assert made.bands == ("a", "b", "c", "d")
    json.dumps(made.to_item(SHA))


def test_scores_of_absent_classes_become_null(other_spec):
    made = other_spec(metrics={"iou": {"water": math.nan, "trees": np.float64(0.75)}, "n": np.int64(3)})
    assert made.metrics == {"iou": {"water": None, "trees": 0.75}, "n": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "name: ' ' is not a text"),
        ({"bands": ()}, "bands: a model needs at least one"),
        ({"bands": "blue"}, "bands: 'blue' is not a list"),
        ({"bands": ("B02", "green", "red", "nir")}, r"bands\[0\]: 'B02' is not a STAC common name"),
        ({"bands": ("blue", "green", "red", "blue")}, r"bands\[3\]: 'blue' is given twice"),
        ({"mean": (0.1, 0.2)}, "mean: 2 values for 4 bands"),
        ({"mean": (0.1, 0.2, "x", 0.1)}, r"mean\[2\]: 'x' is not a finite number"),
        ({"mean": (0.1, math.inf, 0.1, 0.1)}, r"mean\[1\]: inf is not a finite number"),
        (
            {"mean": (0.1, 10**400, 0.1, 0.1)},
            r"mean\[1\]: a whole number of more than 30 digits is not a finite number",
        ),
        ({"seasons": {"spring": 5}}, "seasons.spring: 5 is not a text"),
        ({"depth": 32_000_000}, "depth: 32000000 is more than 16384 pixels"),
        ({"std": (1, 1, 0, 1)}, r"std\[2\]: 0 is not positive"),
        ({"std": (1, 1, 1, True)}, r"std\[3\]: True is not a finite number"),
        ({"scale": -1}, "scale: -1 is not positive"),
        ({"activation": "sigmoid"}, "activation: 'sigmoid' is not one of logits, probabilities"),
        ({"stride": 0}, "stride: 0 is not positive"),
        ({"stride": 16.0}, "stride: 16.0 is not a whole number"),
        ({"depth": 48}, "depth: 48 is not a multiple of the stride 32"),
        ({"depth": -32}, "depth: -32 is not a multiple"),
        ({"window": 100}, "window: 100 is not a multiple of the stride 32"),
        ({"window": 128, "depth": 64}, "window: 128 is not a multiple.*larger than twice the depth 64"),
        ({"global_context": 1}, "global_context: 1 is neither true nor false"),
        ({"legend": "worldcover"}, "legend: 'worldcover' is not a Legend"),
        ({"legend": Legend("one", (LandClass(1, "all", "#000000"),))}, "legend 'one': .* at least two classes"),
        ({"architecture": {}}, 'architecture: a "name" is missing'),
        ({"architecture": "Unet"}, "architecture: 'Unet' is not an object"),
        ({"provenance": {"when": object()}}, "provenance.when: object cannot be written"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(other_spec, changes, message):
    with pytest.raises(InputError, match=message):
        other_spec(**changes)


def test_item_round_trip(other_spec):
    made = other_spec(legend=BUILTIN["dynamic-world"], window=256, global_context=True, activation="probabilities")
    assert ModelSpec.from_item(json.loads(json.dumps(made.to_item(SHA)))) == (made, SHA)


def test_only_our_own_properties_are_read(spec):
    item = spec.to_item(SHA)
    item["properties"] = {k: v for k, v in item["properties"].items() if k.startswith("s2seg:")}
    assert ModelSpec.from_item(item)[0] == spec


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", None, "properties.s2seg:version is missing"),
        ("version", 2, "written by a newer s2seg"),
        ("version", "1", "properties.s2seg:version: '1' is not a whole number"),
        ("bands", None, "properties.s2seg:bands is missing"),
        ("std", [1, 1, 1, -1], r"properties.s2seg:std\[3\]: -1 is not positive"),
        ("mean", {"blue": 1}, "properties.s2seg:mean: .* is not a list"),
        ("legend", {"classes": [{"code": 1}]}, "properties.s2seg:legend: each class needs code, name and color"),
        ("weights_sha256", "abc", "properties.s2seg:weights_sha256: not 64 hexadecimal digits"),
    ],
)
def test_a_key_that_is_missing_or_wrong_is_named(spec, key, value, message):
    item = spec.to_item(SHA)
    item["properties"]["s2seg:" + key] = value
    if value is None:
        del item["properties"]["s2seg:" + key]
    with pytest.raises(InputError, match=message):
        ModelSpec.from_item(item)


@pytest.mark.parametrize("item", [[], None, {}, {"properties": []}])
def test_other_json_is_not_a_model(item):
    with pytest.raises(InputError, match="not a STAC item"):
        ModelSpec.from_item(item)


@pytest.mark.parametrize("name", ["test net", "7 classes, v1.2", "é", "x"])
def test_item_is_valid_stac(other_spec, name):
    item = other_spec(name=name, window=256).to_item(SHA)
    schemas = get_local_schema_cache()
    registry = Registry().with_resources((uri, Resource.from_contents(schema)) for uri, schema in schemas.items())
    core = next(schema for uri, schema in schemas.items() if uri.endswith("/item.json"))
    errors = list(jsonschema.Draft7Validator(core, registry=registry).iter_errors(item))
    assert errors == []


def test_item_speaks_the_model_extension(other_spec):
    made = other_spec(window=256)
    item = pystac.Item.from_dict(made.to_item(SHA), migrate=False)
    mlm = MLMExtension.ext(item)  # raises unless the item declares the version that pystac knows
    assert mlm.mlm_name == "test-net"
    assert list(mlm.tasks) == ["semantic-segmentation"]
    assert mlm.framework == "PyTorch"
    [model_input], [model_output] = mlm.input, mlm.output
    assert model_input.bands == list(made.bands)
    assert model_input.input.shape == [-1, 4, 256, 256]
    assert model_output.result.shape == [-1, 3, 256, 256]
    assert model_output.properties["classification:classes"][2] == {
        "value": 200,
        "name": "bright",
        "description": "bright",
        "color_hint": "F0F0F0",
    }
    # its scaling, taken at its word, must be ours
    dn = 3000
    for i, scaling in enumerate(model_input.properties["value_scaling"]):
        z = (dn - scaling["mean"]) / scaling["stddev"]
        assert z == pytest.approx((dn * 1e-4 - made.mean[i]) / made.std[i])
    assert "mlm:model" in item.assets["weights"].roles
