"""The training configuration: what it accepts, how it words mistakes, what identifies it, and its template."""

import pickle
import re

import pytest
import yaml

from s2seg.errors import InputError
from s2seg.legend import BUILTIN
from s2seg.sources.composite import CompositeSpec
from s2seg.training.config import ConfigError, RasterLabelsConfig, TrainConfig, VectorLabelsConfig, load_config
from s2seg.training.sections import Section
from s2seg.training.template import template

TEXT = """
legend: worldcover
bands: [blue, green, red, nir]
areas:
  - name: north
    catalog: ${S2SEG_TEST_DATA:-../data}/north/catalog.json
    datetime: 2020-08
    labels: {raster: north.tif}
"""
TILES = {"areas": [], "tiles": {"images": "i", "labels": "l"}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load TEXT with top-level keys replaced (None removes one) and overrides."""
    monkeypatch.delenv("S2SEG_TEST_DATA", raising=False)
    (tmp_path / "runs").mkdir()
    file = tmp_path / "runs" / "first.yaml"

    def load(*overrides, **changes):
        values = yaml.safe_load(TEXT) | changes
        file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
        return load_config(file, overrides)

    return load


def test_a_short_file_is_enough(load, tmp_path):
    config = load()
    assert (config.name, config.legend, config.composite) == ("first", BUILTIN["worldcover"], CompositeSpec())
    area = config.areas[0]
    assert (area.datetime, area.catalog) == (("2020-08",), str(tmp_path / "data/north/catalog.json"))
    assert area.labels == RasterLabelsConfig(raster=str(tmp_path / "runs/north.tif"))
    assert config.channels == config.bands == ("blue", "green", "red", "nir")
    assert (config.network.stride, config.chips.sizes, config.drop_codes) == (32, (), ())


def test_values_take_the_forms_that_people_write(load, tmp_path, monkeypatch):
    monkeypatch.setenv("S2SEG_TEST_DATA", "/data/s2")
    (tmp_path / "runs" / "own.yaml").write_text(yaml.safe_dump(BUILTIN["esri"].to_dict()))
    config = load(
        "areas.0.datetime=[2020, 2021-08-13]",
        "crs=32633",
        "areas.0.labels={vector: a.gpkg, column: class, remap: {7: water, forest: null}}",
        "areas.0.aoi=[1, 2, 3, 4.5]",
        "optimizer.learning_rate=1e-2",
        "composite=medoid",
        "network.arguments.encoder_depth=3",
        "network.weights=imagenet",
        legend="own.yaml",
        seasons={"spring": "03-01/05-31", "winter": "12-01/02-29"},
        chips={"size": 136, "sizes": [256], "drop_only": ["water"]},
    )
    area = config.areas[0]
    assert (area.datetime, area.catalog) == (("2020", "2021-08-13"), "/data/s2/north/catalog.json")
    assert config.crs == "32633"
    assert (area.aoi, config.optimizer.learning_rate) == ((1, 2, 3, 4.5), 0.01)
    assert area.labels == VectorLabelsConfig(
        vector=str(tmp_path / "runs/a.gpkg"), column="class", remap={7: "water", "forest": None}
    )
    assert config.composite == CompositeSpec(method="medoid")
    assert (config.network.stride, config.network.weights) == (8, "imagenet")
    assert (config.legend, config.drop_codes) == (BUILTIN["esri"], (1,))
    assert config.channels[:5] == ("blue@spring", "green@spring", "red@spring", "nir@spring", "blue@winter")


@pytest.mark.parametrize(
    "name", ["earth-search", "https://example.com/stac", "/vsis3/bucket/catalog.json", "/a/c.json"]
)
def test_names_urls_and_absolute_paths_stay(load, name):
    assert load(f"areas.0.catalog={name}").areas[0].catalog == name


def test_what_is_saved_loads_as_the_same(load, tmp_path):
    config = load(
        "areas.0.labels.remap={1: water}",
        "composite={method: percentile, mask: [], percentile: 30}",
        "chips.sizes=[64]",
    )
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    tiles = load(**TILES)
    (tmp_path / "saved.yaml").write_text(tiles.to_yaml())
    assert load_config(tmp_path / "saved.yaml") == tiles


def test_the_order_of_seasons_counts(load):
    spring, summer = {"spring": "03-01/05-31"}, {"summer": "06-01/08-31"}
    one, other = (
        load("areas.0.datetime=2020", seasons=s).fingerprint("data") for s in (spring | summer, summer | spring)
    )
    assert one != other


def test_fingerprints_change_with_what_they_stand_for(load):
    data, everything = load().fingerprint("data"), load().fingerprint("all")
    assert len(data) == len(everything) == 64
    assert data != everything
    for override, changes_data, changes_all in [
        ("bands=[red, nir]", True, True),
        ("chips.stride=32", True, True),
        ("areas.0.datetime=2021-08", True, True),
        ("legend=esri", True, True),
        ("composite.percentile=26", True, True),
        ("fit.seed=1", False, True),
        ("loss=dice", False, True),
        ("fit.devices=2", False, False),
        ("fit.accelerator=cpu", False, False),
        ("logs=[csv]", False, False),
        ("name=other", False, False),
        ("tune.chip_sizes=[64]", False, False),
    ]:
        config = load(override)
        assert (config.fingerprint("data") != data, config.fingerprint("all") != everything) == (
            changes_data,
            changes_all,
        ), override


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("fit.epoch=3", "fit.epoch: unknown key, did you mean epochs?"),
        ("epochs=3", "epochs: unknown key, did you mean fit.epochs?"),
        ("fit.steps=3", "fit.steps: unknown key, did you mean steps_per_epoch?"),
        ("steps=3", "steps: unknown key, did you mean fit.steps_per_epoch?"),
        ("comp=3", "comp: unknown key, did you mean composite?"),
        ("zzz=3", "zzz: unknown key, choose name, legend"),
        ("areas.0.labels.rastr=2", "areas.0.labels.rastr: unknown key, did you mean raster?"),
        (
            "areas.0.labels={vector: a, colum: b}",
            "areas.0.labels.column: is missing; areas.0.labels.colum: unknown key",
        ),
        ("areas.0.labels={}", "areas.0.labels: give either raster: PATH, or vector: PATH and column: NAME"),
        ("areas.0.catalg=x", "areas.0.catalg: unknown key, did you mean catalog?"),
        ("loss=focl", "loss: unknown loss 'focl': did you mean focal?"),
        ("schedule=onecycle", "schedule: unknown 'onecycle': did you mean one_cycle?"),
        ("bands=[red, nri]", "bands: unknown 'nri': did you mean nir?"),
        ("bands=[red, red]", "bands: 'red' is given twice"),
        ("bands=[scl]", "bands: unknown 'scl'"),
        ("legend=esry", "legend: unknown legend 'esry'"),
        ("legend={classes: [{code: 1, name: a, color: '#ffffff'}]}", "legend: one class only"),
        ("composite.percentil=3", "composite.percentil: unknown key, did you mean percentile?"),
        ("composite=medan", "composite.method: unknown 'medan': did you mean median?"),
        ("composite.mask=[fog]", "composite: unknown SCL class 'fog'"),
        ("fit.epochs=0", "fit.epochs: should be greater than 0, not 0"),
        ("fit.epochs=many", "fit.epochs: should be a whole number, not 'many'"),
        (
            "fit={keep: last, patience: 3}",
            "fit: keep: last would keep the weights of the epoch that patience gives up at",
        ),
        ("fit.seed=99999999999999999999", "fit.seed: should be less than or equal to 4294967295"),
        ("fit.batch_size=200000", "fit.batch_size: the pixels of 200000 chips alone take 49 GiB; use fewer"),
        ("split.seed=true", "split.seed: cannot be true"),
        ("resolution=true", "resolution: cannot be true"),
        ("crs=no", "crs: cannot be false"),
        ("bands=red", "bands: should be a list, not 'red'"),
        ("bands=[]", "bands: is empty"),
        ("bands=[1]", "bands.0: should be text, not 1"),
        ("name=", "name: should be text, not null"),
        ("fit=5", "fit: should be keys with values, not 5"),
        ("legend=5", "legend: should be a name, a file or keys with values, not 5"),
        ("legend={classes: [{code: 1, name: no, color: '#ffffff'}]}", "legend: class 1: its name False is not text"),
        ("areas.0.datetime=null", "areas.0.datetime.0: should be text, not null"),
        ("areas.0.datetime=[]", "areas.0.datetime: is empty"),
        ("areas.0.aoi=[1, 2]", "areas.0.aoi: makes no sense; the template says: west, south, east, north in degrees"),
        ("areas.0.labels.remap={1.5: 2}", "areas.0.labels.remap.1.5: makes no sense; the template says: value in"),
        ("augment.mixed_dates=2", "augment.mixed_dates: should be less than or equal to 1"),
        ("augment.scale=[2, 1]", "augment.scale: least first"),
        ("augment.scale=[1, 2, 3]", "augment.scale: should have 2 entries, not 3"),
        ("chips.size=100", "chips.size: 100 is not a multiple of the network's stride 32"),
        ("chips.sizes=[100000]", "chips.sizes.0: should be less than or equal to 4096, not 100000"),
        ("split.buffer=100000", "split.buffer: should be less than or equal to 2048, not 100000"),
        ("tune.chip_sizes=[64, 100]", "tune.chip_sizes: 100 is not a multiple of the network's stride 32"),
        ("tune.learning_rate=[1e-2, 1e-3]", "tune.learning_rate: least first"),
        ("tune.losses=[dice, focl]", "tune.losses.1: unknown loss 'focl': did you mean focal?"),
        ("tune.encoder=[resnet18]", "tune.encoder: unknown key, did you mean encoders?"),
        ("chips.stride=129", "chips: stride 129 is larger than size 128"),
        ("chips.drop_only=[watr]", "chips.drop_only: unknown 'watr'"),
        ("network.depth=40", "network.depth: 40 is not a multiple"),
        ("network.arguments.encoder_depth=no", "network.arguments: encoder_depth is a whole number"),
        ("split.fractions=[0.5, 0.3, 0.1]", "split.fractions: train, validation and test add up to 0.9, not to 1"),
        ("split.fractions=[0.5, 0, 0.5]", "split.fractions: train and validation need a share each"),
        ("split.by=geometries", "split: by: geometries and the key geometries"),
        ("split.by=area", "areas.0.split: say train, validation or test"),
        ("areas.0.split=train", "areas.0.split: counts only with split.by: area"),
        ("seasons={summer: 06-31/08-31}", "seasons.summer: '06-31/08-31' is not a season"),
        ("seasons={Summer: 06-01/08-31}", "seasons: 'Summer' is not one word"),
        ("areas=[]", "areas: give either areas or tiles"),
        ("tiles={images: a, labels: b}", "areas: give either areas or tiles, not both"),
        ("areas.0.catalog=${NOT_SET_ANYWHERE}", "areas.0.catalog: the environment has no NOT_SET_ANYWHERE; set it"),
        ("fit", "cannot set 'fit': write key=value"),
        ("areas.1.name=x", "cannot set 'areas.1.name=x': '1' is none of the entries 0 to 0"),
        ("legend.x.y=1", "cannot set 'legend.x.y=1'"),
        ("fit={epochs: 1, epochs: 2}", "cannot set 'fit={epochs: 1, epochs: 2}': the value gives 'epochs' twice"),
        ("fit.epochs=[", "cannot set 'fit.epochs=[': the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(load, override, says):
    with pytest.raises(ConfigError) as caught:
        load(override)
    text = str(caught.value)
    assert text.partition("first.yaml: ")[2].startswith(says)
    assert "\n" not in text and not re.search(r"tuple|dict|NoneType|valid (int|str|num|bool)|\[key\]", text)
    assert isinstance(caught.value, InputError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_all_mistakes_are_listed(load):
    with pytest.raises(ConfigError) as caught:
        load("fit.epoch=3", "schedule=cosin", legend=None)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["legend", "schedule", "fit.epoch"]
    with pytest.raises(ConfigError, match=r"two are called 'a'; name them apart; .* none has split: validation"):
        area = {"name": "a", "catalog": "c", "datetime": "2020", "labels": {"raster": "l.tif"}, "split": "train"}
        load(areas=[area, area], split={"by": "area"})
    with pytest.raises(ConfigError, match=r"augment.mixed_dates: tiles have no dates; set it to 0"):
        load("augment.mixed_dates=0.5", **TILES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty; `s2seg train --template`"),
        ("- bands", "holds a list, not keys"),
        ("a: [", "not YAML"),
        ("resolution: 60\nbands: [red]\nresolution: 20", r"gives 'resolution' twice \(line 3\)"),
        ("bands: &all [red, *all]", "is nested too deeply, or in itself"),
        (b"\xff\xfe\x00", "not YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, says):
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says):
        load_config(file)


def sections(model=Section):
    return [section for child in model.__subclasses__() for section in (child, *sections(child))]


def test_every_key_has_help():
    for section in sections():
        assert section.model_config["extra"] == "forbid"
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_the_template_loads_and_names_every_key(tmp_path):
    text = template()
    assert max(map(len, text.splitlines())) <= 120
    for section in sections():
        for name in section.model_fields:
            assert f"{name}:" in text, name
    (tmp_path / "t.yaml").write_text(text)
    config = load_config(tmp_path / "t.yaml")
    defaults = {n: f.get_default(call_default_factory=True) for n, f in TrainConfig.model_fields.items()}
    for name in set(defaults) - {"name", "legend", "bands", "areas"}:
        assert getattr(config, name) == defaults[name], name


@pytest.mark.parametrize("alternative", ["labels", "tiles"])
def test_alternatives_of_the_template_load_uncommented(tmp_path, alternative):
    lines = template().splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith(f"# {alternative}:"))
    end = next(i for i in range(start, len(lines)) if not lines[i].lstrip().startswith("# "))
    lines[start:end] = [line.replace("# ", "", 1) for line in lines[start:end]]
    # what it stands for goes
    first = next(
        i for i, line in enumerate(lines) if line.startswith("areas:" if alternative == "tiles" else "    labels:")
    )
    last = start if alternative == "tiles" else next(i for i in range(first, start) if "# or from" in lines[i])
    (tmp_path / "t.yaml").write_text("\n".join(lines[:first] + lines[last:]))
    config = load_config(tmp_path / "t.yaml")
    assert isinstance(config.areas[0].labels, VectorLabelsConfig) if alternative == "labels" else config.tiles
