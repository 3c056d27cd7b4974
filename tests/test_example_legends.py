from pathlib import Path

import pytest

from s2seg.legend import Legend

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "legends"

CODES = {
    "six-class": (1, 2, 3, 4, 5),  # the sixth, unlabelled, is nodata
    "urban-corine": tuple(range(1, 9)),
    "catalonia": tuple(range(1, 13)),
    "mediterranean": tuple(range(10, 100, 10)),
    "deepglobe": (1, 2, 3, 4, 5, 6),  # the seventh, unknown, is nodata
    "alberta": (1, 2, 3, 4),
    "flanders": (11, 13, 60, 99),
    "labelled": (1, 2, 3, 4, 5, 6, 7, 9),
}


def test_every_file_is_listed_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(CODES)


@pytest.mark.parametrize(("name", "codes"), CODES.items())
def test_example_legends_load_with_a_palette_of_distinct_colours(name, codes):
    legend = Legend.load(FOLDER / f"{name}.yaml")
    assert (legend.name, legend.codes, legend.nodata) == (name, codes, 0)
    assert legend.source
    assert len(set(legend.colormap().values())) == len(codes) + 1


def test_deepglobe_has_the_published_colours():
    legend = Legend.load(FOLDER / "deepglobe.yaml")
    assert [c.rgb for c in legend] == [
        (0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip
