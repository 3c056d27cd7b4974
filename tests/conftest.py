"""Fixtures that every test may ask for."""

import os
import tempfile
from pathlib import Path

import dask
import matplotlib
import pytest

matplotlib.use("Agg")
os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # no directory scans, no sidecar surprises
os.environ.setdefault("CPL_LOG", os.devnull)  # GDAL's own chatter; what matters comes as an exception

_cache = tempfile.TemporaryDirectory(prefix="s2seg-cache-")  # gone when the tests end
os.environ["S2SEG_CACHE"] = _cache.name  # networks converted by tests are nobody's


@pytest.fixture(autouse=True, scope="session")
def two_dask_threads():
    """Enough concurrency to show a race, small enough for every machine; no cluster is started unasked."""
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real Sentinel-2 catalogs; skips where there is none, unless S2SEG_REQUIRE_REAL_DATA=1."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("S2SEG_REAL_DATA", default)).resolve()
    if not (folder / "slovenia" / "catalog.json").is_file():
        reason = f"no real Sentinel-2 catalogs in {folder}; set S2SEG_REAL_DATA"
        if os.environ.get("S2SEG_REQUIRE_REAL_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A small synthetic region: 384 x 384 pixels at 10 m, three dates, two tiles. Read only."""
    from s2seg.testing import synthetic_catalog

    dates = ("2021-04-21", "2021-06-25", "2021-08-29")
    return synthetic_catalog(tmp_path_factory.mktemp("synthetic"), size=384, dates=dates)
