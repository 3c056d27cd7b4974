import numpy as np
import pytest
import yaml

from s2seg.errors import InputError
from s2seg.legend import BUILTIN, LandClass, Legend

TWO = (LandClass(10, "water", "#0000ff"), LandClass(3, "trees", "#00ff00"))


def test_channels_keep_their_order():
    legend = Legend("two", TWO)
    assert (legend.codes, legend.names, legend.colors) == ((10, 3), ("water", "trees"), ("#0000ff", "#00ff00"))
    assert len(legend) == 2
    assert list(legend) == list(TWO)
    table = legend.channel_to_code()
    assert table.dtype == np.uint8
    assert table[np.array([[1, 0], [0, 0]])].tolist() == [[3, 10], [10, 10]]


def test_classes_by_code():
    legend = Legend("two", TWO)
    assert legend[3].name == "trees"
    with pytest.raises(KeyError):
        legend[1]


def test_palette_has_transparent_nodata():
    legend = Legend("two", TWO, nodata=255)
    assert legend.colormap() == {255: (0, 0, 0, 0), 10: (0, 0, 255, 255), 3: (0, 255, 0, 255)}


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_legends_round_trip(name, tmp_path):
    legend = Legend.load(name)
    assert legend.name == name
    assert Legend.from_dict(legend.to_dict()) == legend
    assert Legend.from_dict(legend.to_dict()).source == legend.source
    (tmp_path / "l.yaml").write_text(yaml.safe_dump(legend.to_dict(), allow_unicode=True))
    assert Legend.load(tmp_path / "l.yaml") == legend
    assert legend.nodata not in legend.codes


@pytest.mark.parametrize(
    ("name", "codes", "nodata"),
    [
        ("worldcover", (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100), 0),
        ("dynamic-world", tuple(range(9)), 255),
        ("esri", (1, 2, 4, 5, 7, 8, 9, 10, 11), 0),
        ("corine-1", (1, 2, 3, 4, 5), 0),
        ("corine-2", (11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33, 41, 42, 51, 52), 0),
    ],
)
def test_built_in_legends_have_the_published_codes(name, codes, nodata):
    assert (BUILTIN[name].codes, BUILTIN[name].nodata) == (codes, nodata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LandClass(256, "x", "#000000"), "class 'x': code 256"),
        (lambda: LandClass(-1, "x", "#000000"), "class 'x': code -1"),
        (lambda: LandClass(True, "x", "#000000"), "class 'x': code True"),
        (lambda: LandClass(1.0, "x", "#000000"), r"class 'x': code 1\.0"),
        (lambda: LandClass(1, "x", "red"), "color 'red' is not of the form '#rrggbb'"),
        (lambda: LandClass(1, "x", "#00000g"), "color '#00000g'"),
        (lambda: Legend("l", ()), "legend 'l' has no classes"),
        (lambda: Legend("l", TWO, nodata=10), "nodata 10 is also the class 'water'"),
        (lambda: Legend("l", TWO, nodata=300), "nodata 300 is not"),
        (lambda: Legend("l", TWO, nodata=None), "nodata None is not"),
        (lambda: Legend("l", (*TWO, LandClass(3, "z", "#000000"))), "code 3 is given twice"),
        (lambda: Legend("l", (*TWO, LandClass(4, "trees", "#000000"))), "name 'trees' is given twice"),
        (lambda: Legend.from_dict({"classes": 3}), "legend: a legend needs a list `classes`"),
        (lambda: Legend.from_dict([1, 2]), "legend: a legend needs a list `classes`"),
        (lambda: Legend.from_dict({"classes": ["water"]}), "legend: each class needs code, name and color"),
        (lambda: Legend.from_dict({"classes": [{"code": 1, "name": "a"}]}, "L"), "L: each class .*color"),
        (lambda: Legend.load("worldcovr"), "unknown legend 'worldcovr': give a YAML file or one of worldcover"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"classes: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"", "a legend needs a list `classes`"),
        (b"classes:\n- {code: '1', name: a, color: '#000000'}", "class 'a': code '1'"),
        (b"classes:\n- {code: 1, name: no, color: '#000000'}", "class 1: its name False is not text; .* in quotes"),
        (b"classes:\n- {code: 1, name: a, color: 000000}", "class 'a': color 0 is not of the form .*, in quotes"),
        (b"nodata: 0\nnodata: 255\n", r"l.yaml gives 'nodata' twice \(line 2\)"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "l.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Legend.load(tmp_path / "l.yaml")
    assert "\n" not in str(caught.value)


def test_a_legend_without_a_name_is_called_after_its_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("classes:\n- {code: 1, name: jezioro głębokie, color: '#000000'}\n", "utf-8")
    legend = Legend.load(tmp_path / "mine.yaml")
    assert (legend.name, legend.names) == ("mine", ("jezioro głębokie",))
