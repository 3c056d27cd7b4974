"""A baseline to beat: a random forest that sees each pixel alone (Breiman 2001, doi:10.1023/A:1010933404324)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.delayed import delayed

from s2seg.errors import InputError
from s2seg.legend import Legend

_BATCH = 2**16  # pixels that go through one tree after the other while both stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Forest:
    """A fitted per-pixel classifier; made by :func:`fit_forest`.

    Parameters
    ----------
    legend
        What its answers mean.
    bands
        How many bands it expects.
    fingerprint
        A hash of what it was fitted on and how: forests of one fingerprint give one map.
    classifier
        scikit-learn's forest, fitted on (pixels, bands) float32 DN with legend codes as classes.
    """

    legend: Legend
    bands: int
    fingerprint: str
    classifier: Any

    def predict(self, scene: xr.DataArray) -> xr.DataArray:
        """Classify every pixel of a scene, lazily, block by block.

        Parameters
        ----------
        scene
            (band, y, x) uint16 DN, nodata 0, with the bands that the forest was fitted on, in that order.

        Returns
        -------
        xr.DataArray
            (y, x) uint8 legend codes, cut like the scene; nodata where any band is 0.

        Raises
        ------
        InputError
            If the scene has another number of bands.
        """
        scene = scene.transpose("band", "y", "x")
        if scene.sizes["band"] != self.bands:
            raise InputError(
                f"the forest was fitted on {self.bands} bands and the scene has {scene.sizes['band']}; "
                "select the same bands in the same order"
            )
        # one node of the graph holds the forest for all blocks; its name spares dask from hashing a hundred trees
        shared = delayed(self, name=f"forest-{self.fingerprint}", traverse=False)
        codes = da.map_blocks(
            _predict_block,
            scene.chunk(band=-1).data,
            forest=shared,
            drop_axis=0,
            dtype=np.uint8,
            meta=np.empty((0, 0), np.uint8),
        )
        coords = {name: c for name, c in scene.coords.items() if "band" not in c.dims and name != "band"}
        return xr.DataArray(codes, dims=("y", "x"), coords=coords, name="land_cover")


def fit_forest(
    images: npt.NDArray[np.uint16],
    labels: npt.NDArray[np.uint8],
    legend: Legend,
    *,
    pixels: int = 100_000,
    trees: int = 100,
    seed: int = 0,
) -> Forest:
    """Fit a random forest on single pixels of chips; a network has to beat it to show that context helps.

    The settings are scikit-learn's defaults (trees grown to the end, the square root of the number of bands tried at
    each split), and pixels are drawn uniformly, without balancing the classes: what people reach for first.

    Parameters
    ----------
    images
        (n, band, y, x) uint16 DN, nodata 0.
    labels
        (n, y, x) uint8 legend codes.
    legend
        What the codes mean.
    pixels
        How many pixels to draw, without replacement, from those with a label and all bands; all if there are fewer.
    trees
        Size of the forest.
    seed
        Decides the pixels and the trees; one seed gives one forest, on any number of processors.

    Returns
    -------
    Forest

    Raises
    ------
    InputError
        If scikit-learn is missing, shapes do not match, codes are not in the legend or no pixel is usable.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise InputError("the forest needs scikit-learn: pip install 's2seg[train]'") from error
    features, codes = _sample(images, labels, legend, pixels, seed)
    classifier = RandomForestClassifier(n_estimators=trees, random_state=seed, n_jobs=-1).fit(features, codes)
    parts = (features.tobytes(), codes.tobytes(), f"{trees} {seed} {legend.to_dict()}".encode())
    fingerprint = hashlib.sha256(b"|".join(parts)).hexdigest()[:16]
    return Forest(legend, features.shape[1], fingerprint, classifier)


def _sample(
    images: npt.NDArray[np.uint16], labels: npt.NDArray[np.uint8], legend: Legend, pixels: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """(k, band) DN and (k,) codes of usable pixels, in the order in which they lie."""
    if images.ndim != 4 or labels.shape != (len(images), *images.shape[2:]):
        raise InputError(f"chips (n, band, y, x) and labels (n, y, x) do not match: {images.shape} and {labels.shape}")
    unknown = np.setdiff1d(np.unique(labels), (*legend.codes, legend.nodata))
    if unknown.size:
        raise InputError(f"the labels have codes that legend {legend.name!r} does not: {', '.join(map(str, unknown))}")
    usable = np.flatnonzero((labels != legend.nodata) & (images != 0).all(axis=1))
    if not usable.size:
        raise InputError("no pixel of the chips has both a label and all bands, so there is nothing to fit a forest on")
    if usable.size > pixels:
        usable = np.sort(np.random.default_rng(seed).choice(usable, pixels, replace=False))
    n, y, x = np.unravel_index(usable, labels.shape)
    return images[n, :, y, x].astype(np.float32), labels[n, y, x]


def _predict_block(block: npt.NDArray[np.uint16], *, forest: Forest) -> npt.NDArray[np.uint8]:
    """(band, y, x) DN -> (y, x) codes."""
    out = np.full(block.shape[1:], forest.legend.nodata, np.uint8)
    valid = (block != 0).all(axis=0)
    features = block[:, valid].T.astype(np.float32)
    parts = (_vote(forest.classifier, features[i : i + _BATCH]) for i in range(0, len(features), _BATCH))
    out[valid] = np.concatenate([np.empty(0, np.uint8), *parts])
    return out


def _vote(classifier: Any, features: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """As ``classifier.predict``, in this thread: dask brings the others."""
    shares = np.zeros((len(features), len(classifier.classes_)))
    for tree in classifier.estimators_:
        shares += tree.predict_proba(features, check_input=False)
    codes: npt.NDArray[np.uint8] = classifier.classes_[shares.argmax(axis=1)].astype(np.uint8)
    return codes
