"""What Sentinel-2 would see of a landscape on one day: spectra, season, relief, air, clouds and the sensor."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, special

from s2seg.testing.landscape import Floats, Landscape, Material, smooth_noise, uniform

BANDS_10M = ("blue", "green", "red", "nir")
BANDS_20M = ("rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22")
BANDS = BANDS_10M + BANDS_20M

# Surface reflectance in percent, in the order of BANDS: round values of the shape and level that the ECOSTRESS library
# (Meerdink et al. 2019, doi:10.1016/j.rse.2019.05.015) and the USGS library (Kokaly et al. 2017, doi:10.3133/ds1035)
# show for such materials, and that L2A scenes show for inland water.
_STATIC: dict[Material, tuple[float, ...]] = {
    Material.WATER: (3.2, 3.6, 2.2, 1.3, 1.8, 1.4, 1.4, 1.1, 0.7, 0.5),
    Material.SHALLOWS: (6.5, 9.0, 6.2, 2.6, 4.6, 2.9, 2.7, 2.2, 1.0, 0.7),
    Material.CONIFER: (1.7, 3.0, 2.0, 21.0, 5.0, 14.5, 18.5, 22.5, 9.5, 4.4),
    Material.ASPHALT: (9.0, 10.0, 10.8, 13.0, 11.5, 12.2, 12.7, 13.5, 16.0, 15.0),
    Material.CONCRETE: (13.5, 16.0, 17.8, 21.5, 19.0, 20.0, 21.0, 22.5, 26.0, 24.5),
    Material.TILE: (7.0, 9.5, 16.5, 24.0, 19.0, 21.5, 22.5, 25.0, 30.0, 26.5),
    Material.METAL: (36.0, 38.0, 39.0, 40.0, 39.0, 39.5, 40.0, 40.5, 38.0, 34.0),
    Material.GRAVEL: (14.0, 17.5, 20.5, 24.5, 22.0, 23.0, 24.0, 25.0, 29.0, 27.0),
}
_LEAF = (2.6, 6.6, 2.9, 45.0, 9.5, 33.0, 42.0, 47.0, 20.0, 8.8)  # a closed green canopy of crops
_CROWN = (2.0, 4.6, 2.2, 36.0, 7.5, 26.0, 33.5, 38.0, 16.0, 7.0)  # broadleaved trees: darker, for their own shadows
_TURF = (3.4, 7.4, 4.4, 35.0, 11.0, 27.0, 32.5, 37.0, 23.0, 12.5)
_STRAW = (7.5, 11.5, 16.5, 27.5, 20.0, 23.0, 25.0, 29.0, 36.0, 27.0)
_SOIL = (6.2, 8.8, 12.0, 18.5, 14.5, 16.0, 17.2, 20.0, 27.0, 24.0)
_BLOSSOM = (4.5, 17.5, 15.5, 46.0, 21.0, 37.0, 43.0, 47.0, 21.0, 10.0)  # rapeseed in May
_TWIGS = (4.5, 6.2, 8.0, 17.5, 11.0, 13.5, 15.5, 19.0, 21.0, 14.0)  # trees without leaves
_CLOUD = (62.0, 60.0, 60.0, 63.0, 61.0, 62.0, 63.0, 63.0, 46.0, 36.0)
_PATH = (3.2, 1.9, 1.2, 0.5, 1.0, 0.8, 0.6, 0.5, 0.1, 0.05)  # light that haze adds, ~ wavelength ** -3


@dataclass(frozen=True)
class _Crop:
    """A crop's year, in days of the year: green-up, ripening, harvest, and when it blossoms or is green again."""

    up: float
    down: float
    harvest: float
    peak: float = 0.92
    blossom: float = 0.0
    again: float = 999.0


_CROPS = (
    _Crop(up=82, down=172, harvest=199, again=262),  # winter wheat, then a catch crop
    _Crop(up=88, down=176, harvest=204),  # barley, then stubble
    _Crop(up=78, down=172, harvest=191, blossom=121),  # rapeseed
    _Crop(up=166, down=252, harvest=272),  # maize
    _Crop(up=158, down=238, harvest=258, peak=0.85),  # sunflower, soya
    _Crop(up=150, down=292, harvest=305, peak=0.95),  # sugar beet
)


@dataclass(frozen=True)
class Sun:
    """Where the sun stands, in degrees; azimuth clockwise from north."""

    elevation: float
    azimuth: float


def sun_at(when: dt.datetime, latitude: float) -> Sun:
    """Sun position at the satellites' local overpass, about 10:30 solar time."""
    declination = np.radians(-23.44 * np.cos(2 * np.pi * (when.timetuple().tm_yday + 10) / 365.25))
    phi, hour = np.radians(latitude), np.radians(-22.5)
    sin_el = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(hour)
    elevation = np.arcsin(sin_el)
    cos_az = (np.sin(declination) - sin_el * np.sin(phi)) / (np.cos(elevation) * np.cos(phi))
    return Sun(float(np.degrees(elevation)), float(np.degrees(np.arccos(np.clip(cos_az, -1, 1)))))


@dataclass(frozen=True)
class Scene:
    """One acquisition, before it is cut into tiles.

    Parameters
    ----------
    bands
        Name -> (y, x) uint16, DN = reflectance * 10000 without any offset, at least 1 where seen and 0 elsewhere;
        the bands of ``BANDS_20M`` have half as many pixels per side.
    scl
        (y / 2, x / 2) uint8, Sen2Cor's scene classification, as imperfect as the real one.
    sun
        For the metadata.
    """

    bands: dict[str, npt.NDArray[np.uint16]]
    scl: npt.NDArray[np.uint8]
    sun: Sun


def make_scene(
    land: Landscape, when: dt.datetime, *, cloud_cover: float, latitude: float, cut: bool, seed: int
) -> Scene:
    """Look at `land` from orbit.

    Parameters
    ----------
    land
        What is there; an even number of pixels per side.
    when
        Decides the season and the sun.
    cloud_cover
        Share of the area under clouds, 0 to 1.
    latitude
        Degrees north.
    cut
        Whether the edge of the swath crosses the area, so that its east was not seen (:func:`swath_edge`).
    seed
        Of weather and noise.
    """
    rng = np.random.default_rng(seed)
    size, sun = land.land_cover.shape[0], sun_at(when, latitude)
    sky = _Sky.over(rng, size, land.resolution, cloud_cover, sun)
    seen = np.ones((size, size), bool)
    if cut:
        seen = np.arange(size) < swath_edge(size, np.arange(size))[:, None]
    bands: dict[str, npt.NDArray[np.uint16]] = {}
    for i, (name, ground) in enumerate(zip(BANDS, _reflectance(land, when, sun), strict=True)):
        seen_by_band, sky_over_band = (seen, sky) if name in BANDS_10M else (halve(seen) == 1, sky.halved)
        radiance = ndimage.gaussian_filter(ground, 0.45) if name in BANDS_10M else halve(ground)
        radiance = sky_over_band.through(radiance, _CLOUD[i] / 100, _PATH[i] / 100)
        radiance += (0.0012 + 0.006 * radiance) * rng.standard_normal(radiance.shape, dtype=np.float32)
        bands[name] = np.where(seen_by_band, np.clip(np.rint(radiance * 10_000), 1, 20_000), 0).astype(np.uint16)
    return Scene(bands, _classify(rng, bands, sky.halved, land.resolution), sun)


def swath_edge(size: int, y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Column at which a cut scene ends in row `y`: a line that leans as a descending orbit does."""
    return 0.72 * size - 0.25 * (np.asarray(y, np.float64) - size / 2)


def halve(values: npt.NDArray[Any]) -> Floats:
    """Mean of each two by two pixels."""
    y, x = values.shape
    return np.asarray(values.reshape(y // 2, 2, x // 2, 2).mean(axis=(1, 3), dtype=np.float32))


def _reflectance(land: Landscape, when: dt.datetime, sun: Sun) -> Floats:
    """(band, y, x) reflectance of the ground in full sun, without air."""
    parts = [(spectrum, land.fractions[material]) for material, spectrum in _STATIC.items()] + _plants(land, when)
    spectra, amounts = zip(*parts, strict=True)
    mixed = np.tensordot(np.array(spectra, np.float32).T / 100, np.stack(amounts), 1)
    return np.asarray(mixed * (land.texture * _light(land, sun)), np.float32)


def _light(land: Landscape, sun: Sun) -> Floats:
    """Direct light on the slope relative to level ground, softened by the sky's own light."""
    down, east = np.gradient(land.elevation, land.resolution)
    elevation, azimuth = np.radians(sun.elevation), np.radians(sun.azimuth)
    facing = (down * np.cos(azimuth) - east * np.sin(azimuth)) / np.tan(elevation)
    return np.asarray(np.clip(1 + 0.8 * facing, 0.5, 1.4), np.float32)


def _rise(day: npt.ArrayLike, middle: npt.ArrayLike, width: float) -> Floats:
    """Logistic step from 0 to 1 around `middle`; two of them make a season (Beck et al. 2006)."""
    return np.asarray(special.expit((np.asarray(day) - middle) / width), np.float32)


def _plants(land: Landscape, when: dt.datetime) -> list[tuple[tuple[float, ...], Floats]]:
    """Spectra of what grows, and how much of each pixel they fill on the day."""
    day, crop, grass = when.timetuple().tm_yday, land.fractions[Material.CROP], land.fractions[Material.GRASS]
    trees, late = land.fractions[Material.BROADLEAF], 16 * (uniform(land.parcel, 31) - 0.5)

    # a parcel carries another crop each year
    kind = (uniform(land.parcel, 32 + when.year) * len(_CROPS)).astype(np.intp)
    up, down, harvest, peak, blossom, again = (
        np.array([getattr(c, name) for c in _CROPS], np.float32)[kind]
        for name in ("up", "down", "harvest", "peak", "blossom", "again")
    )
    standing = _rise(harvest, day - late, 1.5)
    green = peak * _rise(day - late, up, 8) * _rise(down, day - late, 7) * standing
    green += 0.6 * _rise(day - late, again, 6)
    dry = standing * _rise(day - late, down, 7) * 0.85
    dry += (1 - standing) * 0.55 * np.exp(-np.clip(day - late - harvest, 0, None) / 25) * (1 - green)
    flower = 0.8 * green * np.exp(-(((day - late - blossom) / 11) ** 2)) * (blossom > 0)
    bare = np.clip(1 - green - dry, 0, 1) * (0.75 + 0.55 * uniform(land.parcel, 33))

    leaves = float(_rise(day, 112, 6) * _rise(298, day, 8))
    cut_days_ago = (day + 45 * uniform(land.parcel, 34)) % 45
    lush = (0.5 + 0.4 * float(_rise(day, 88, 10) * _rise(300, day, 14))) * (0.72 + 0.28 * _rise(cut_days_ago, 12, 4))
    return [
        (_LEAF, crop * (green - flower)),
        (_BLOSSOM, crop * flower),
        (_STRAW, crop * dry + grass * (0.85 * (1 - lush))),
        (_SOIL, crop * bare + grass * (0.15 * (1 - lush))),
        (_TURF, grass * lush),
        (_CROWN, trees * leaves),
        (_TWIGS, trees * (1 - leaves)),
    ]


@dataclass(frozen=True)
class _Sky:
    """Clouds (opacity), their shadows, thin cirrus and haze, each (y, x) and about 0 to 1."""

    cloud: Floats
    shadow: Floats
    cirrus: Floats
    haze: Floats

    @classmethod
    def over(cls, rng: np.random.Generator, size: int, resolution: float, cover: float, sun: Sun) -> _Sky:
        haze = (0.3 + 0.7 * rng.random()) * (1 + 0.3 * smooth_noise(rng, size, 4000 / resolution))
        billows = smooth_noise(rng, size, 1500 / resolution, 2.3)
        opacity = np.clip((billows - np.quantile(billows, 1 - cover)) / 0.5, 0, 1) if cover else np.zeros_like(billows)
        cloud = opacity**2 * (3 - 2 * opacity)
        veil = smooth_noise(rng, size, 3500 / resolution, 2.6)
        cirrus = np.clip(veil - 1.2, 0, 1) * min(1.0, 2 * cover)
        # a cloud's shadow falls away from the sun, as far as its height over the tangent of the sun's elevation
        reach = rng.uniform(700, 1300) / np.tan(np.radians(sun.elevation)) / resolution
        azimuth = np.radians(sun.azimuth)
        shift = (round(reach * np.cos(azimuth)), round(-reach * np.sin(azimuth)))
        return cls(cloud, np.roll(cloud, shift, (0, 1)), cirrus, haze)

    @property
    def halved(self) -> _Sky:
        return _Sky(halve(self.cloud), halve(self.shadow), halve(self.cirrus), halve(self.haze))

    def through(self, ground: Floats, cloud: float, path: float) -> Floats:
        """Look at `ground` from above; `cloud` is a dense cloud's reflectance, `path` what haze adds."""
        lit = ground * (1 - 0.62 * self.shadow) + self.haze * path + 0.06 * self.cirrus
        return np.asarray(lit * (1 - self.cloud) + cloud * (0.55 + 0.5 * self.cloud) * self.cloud, np.float32)


def _classify(
    rng: np.random.Generator, bands: dict[str, npt.NDArray[np.uint16]], sky: _Sky, resolution: float
) -> npt.NDArray[np.uint8]:
    """Sen2Cor's classes at 20 m: shaky at the rims of clouds, blind to thin ones, and fooled by bright roofs."""
    green, red, nir = (halve(bands[name]) / 10_000 for name in ("green", "red", "nir"))
    index = (nir - red) / np.maximum(nir + red, 1e-4)
    shaky = 0.1 * smooth_noise(rng, red.shape[0], 40 / resolution, 2)
    cloud, shadow = sky.cloud + shaky, sky.shadow + 1.5 * shaky
    bright = (red > 0.27) & (index < 0.2)
    scl = np.full(red.shape, 5, np.uint8)
    scl[(index > 0.28) & (index < 0.36)] = 7
    scl[index >= 0.36] = 4
    scl[(nir < 0.09) & (index < 0.3)] = 2
    scl[(nir < 0.075) & (green > nir)] = 6
    scl[(shadow > 0.45) & (nir < 0.25)] = 3
    scl[bright & (shaky > 0.08)] = 8
    scl[sky.cirrus + 0.5 * shaky > 0.3] = 10
    scl[cloud > 0.3] = 8
    scl[cloud > 0.7] = 9
    scl[halve(bands["red"] == 0) > 0] = 0
    return scl
