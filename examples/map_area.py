"""The stages of ``s2seg map``, one by one, in Python: everything is lazy until it is written.

    python examples/map_area.py CATALOG AOI DATETIME MODEL OUTPUT [RESOLUTION]

For one call instead of seven, use ``s2seg.map_area``, which also reads real pixels around the area as context.
"""

from __future__ import annotations

import sys
from pathlib import Path

import xarray as xr

import s2seg


def main(catalog: str, aoi: str, datetime: str, model_path: str, output: str, resolution: float = 10.0) -> xr.Dataset:
    area = s2seg.parse_aoi(aoi)
    model = s2seg.load_model(model_path)
    items = s2seg.search(catalog, area, datetime, max_cloud_cover=80)
    grid = s2seg.geobox_for(area, resolution, items)

    pixels = s2seg.stack(items, grid, [*model.spec.bands, "scl"])  # (time, band, y, x) uint16, lazy
    scene = s2seg.composite(pixels, s2seg.CompositeSpec("median", dilate=3 * resolution))  # (band, y, x), lazy
    prediction = s2seg.predict(scene, model, layers=("class", "confidence"))  # land_cover, confidence, lazy

    folder = Path(output)
    zarr = s2seg.write_zarr(prediction, folder / "land_cover.zarr", overwrite=True)  # computes, block by block
    s2seg.write_cog(zarr, folder / "land_cover.tif", legend=model.spec.legend, overwrite=True)
    print(prediction)
    print(f"{len(items)} items -> {folder / 'land_cover.tif'}")
    return prediction


if __name__ == "__main__":
    main(*sys.argv[1:6], *map(float, sys.argv[6:7]))
