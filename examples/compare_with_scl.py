"""Compare a cloud map, made in ``per-date`` mode, with the scene classification (SCL) of the same scenes.

    python examples/compare_with_scl.py OUTPUT [--cloud cloud] [--scl 8,9,10]

OUTPUT is a folder that ``s2seg map --composite per-date`` wrote with a model that has a class for clouds. SCL is a
rule-based product of its own, not the truth: agreement says how alike two opinions are, not which is right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import s2seg
from s2seg.outputs.zarr import read_land_cover
from s2seg.sources.composite import per_date


def compare(
    output: Path, cloud: str = "cloud", scl_codes: tuple[int, ...] = (8, 9, 10)
) -> list[dict[str, float | str]]:
    """One row per date: share of clouds in both, agreement, precision and recall of the map against SCL."""
    record = json.loads((output / "run.json").read_text())
    west, south, east, north = _bounds(record["aoi"])
    mapped_items = {item["id"] for item in record["items"]}
    found = s2seg.search(record["catalog"], (west, south, east, north), record["datetime"])
    items = [item for item in found if item.id in mapped_items]  # the map may have left out cloudy ones
    maps = read_land_cover(output / "land_cover.zarr")
    legend = s2seg.Legend.from_dict(maps.attrs["legend"])
    code = legend.codes[legend.names.index(cloud)]
    # per_date takes what is not scl: here the classification is the band to mosaic
    scl = s2seg.stack(items, maps.odc.geobox, ["scl"]).assign_coords(band=["class"])
    truth = per_date(scl).isel(band=0)
    rows: list[dict[str, float | str]] = []
    for when in maps.time.values:
        mapped, known = maps.land_cover.sel(time=when).values, truth.sel(time=when).values
        valid = (mapped != legend.nodata) & (known != 0)
        a, b = mapped[valid] == code, np.isin(known[valid], scl_codes)
        both = int((a & b).sum())
        rows.append(
            {
                "date": str(np.datetime_as_string(when, unit="D")),
                "scl": float(b.mean()),
                "map": float(a.mean()),
                "agreement": float((a == b).mean()),
                "precision": both / int(a.sum()) if a.any() else float("nan"),
                "recall": both / int(b.sum()) if b.any() else float("nan"),
            }
        )
    return rows


def _bounds(geometry: dict[str, object]) -> tuple[float, float, float, float]:
    import shapely

    bounds: tuple[float, float, float, float] = shapely.geometry.shape(geometry).bounds
    return bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cloud", default="cloud", help="name of the map's cloud class")
    parser.add_argument("--scl", default="8,9,10", help="SCL codes that count as cloud")
    options = parser.parse_args()
    if not (options.output / "run.json").exists():
        parser.error(f"{options.output} holds no run.json: s2seg map --composite per-date --output {options.output}")
    try:
        rows = compare(options.output, options.cloud, tuple(int(c) for c in options.scl.split(",")))
    except s2seg.S2SegError as error:
        parser.error(str(error))
    table = Table("date", "cloud in SCL %", "cloud in map %", "agreement %", "precision %", "recall %")
    for row in rows:
        table.add_row(str(row.pop("date")), *(f"{100 * float(v):.1f}" for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
