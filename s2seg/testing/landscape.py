"""A piece of countryside as numbers: what lies where, how much of each pixel it fills, and how high the ground is.

Lines thinner than a pixel are painted by the share they cover, so that mixed pixels arise as they do on a sensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from s2seg.legend import LandClass, Legend

LEGEND = Legend(
    "synthetic",
    (
        LandClass(1, "water", "#3a7fd5"),
        LandClass(2, "forest", "#1f6b35"),
        LandClass(3, "cropland", "#e8c46a"),
        LandClass(4, "grassland", "#9ccb5b"),
        LandClass(5, "built-up", "#c8383a"),
        LandClass(6, "road", "#4d4d4d"),
        LandClass(7, "bare", "#b9a68f"),
    ),
    source="s2seg.testing: known exactly, because the pixels are made from it",
)
WATER, FOREST, CROPLAND, GRASSLAND, BUILT, ROAD, BARE = LEGEND.codes

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Material(IntEnum):
    """What a pixel is made of; the first axis of :attr:`Landscape.fractions`."""

    WATER = 0
    SHALLOWS = 1
    CONIFER = 2
    BROADLEAF = 3
    CROP = 4
    GRASS = 5
    ASPHALT = 6
    CONCRETE = 7
    TILE = 8
    METAL = 9
    GRAVEL = 10


@dataclass(frozen=True)
class Landscape:
    """A square of land on a regular grid.

    Parameters
    ----------
    land_cover
        (y, x) uint8, codes of :data:`LEGEND`.
    fractions
        (material, y, x) float32, the share of each pixel that each :class:`Material` fills; sums to 1.
    parcel
        (y, x) int64, which field a pixel belongs to.
    elevation
        (y, x) float32, metres.
    texture
        (y, x) float32, how much brighter than its kind each pixel is; crowns and furrows, the same on every date.
    resolution
        Metres per pixel.
    """

    land_cover: npt.NDArray[np.uint8]
    fractions: Floats
    parcel: Ints
    elevation: Floats
    texture: Floats
    resolution: float


def make_landscape(size: int, resolution: float, seed: int) -> Landscape:
    """Lay out hills, fields, woods, a river with lakes and gravel pits, towns, and the roads between them.

    Parameters
    ----------
    size
        Pixels along each side.
    resolution
        Metres per pixel.
    seed
        The same seed gives the same land.
    """
    rng = np.random.default_rng(seed)
    ground = _Ground(size, resolution, rng)
    towns = _towns(ground)
    roads = _roads(ground, towns)
    _paint_fields(ground)
    _paint_woods(ground, towns)
    _paint_pits(ground, towns, roads)
    _paint_river(ground)
    _paint_towns(ground, towns)
    _paint_roads(ground, roads)
    roughness = 0.02 + np.tensordot(_roughness(), ground.fractions, 1)
    texture = np.clip(1 + roughness * ground.noise(28, 2.0), 0.5, 1.6)
    return Landscape(ground.land_cover, ground.fractions, ground.parcel, ground.elevation, texture, resolution)


def _roughness() -> Floats:
    rough = dict.fromkeys(Material, 0.03) | {Material.WATER: 0.0, Material.SHALLOWS: 0.0}
    rough |= {Material.CONIFER: 0.13, Material.BROADLEAF: 0.12, Material.GRASS: 0.05, Material.GRAVEL: 0.1}
    return np.array([rough[m] for m in Material], np.float32)


class _Ground:
    """The canvas that the painters share: coordinates in pixels, terrain, and what has been painted so far."""

    def __init__(self, size: int, resolution: float, rng: np.random.Generator) -> None:
        self.size, self.resolution, self.rng = size, resolution, rng
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32)
        self.fractions = np.zeros((len(Material), size, size), np.float32)
        self.fractions[Material.CROP] = 1
        self.land_cover = np.full((size, size), CROPLAND, np.uint8)
        self.parcel = np.zeros((size, size), np.int64)
        self.river = self.distance_to(_meander(size, self.px(90), rng))
        self.hills = self.noise(3500, 3.6)
        valley = np.exp(-self.river / self.px(900))
        self.elevation = 300 + 55 * self.hills * (1 - valley) - 40 * valley

    def px(self, metres: float) -> float:
        return metres / self.resolution

    def noise(self, metres: float, roughness: float = 3.0) -> Floats:
        return smooth_noise(self.rng, self.size, self.px(metres), roughness)

    def paint(self, mix: dict[Material, float], alpha: npt.ArrayLike, code: int | None = None) -> None:
        """Cover the share `alpha` of each pixel with `mix`; where that is most of a pixel, its class is `code`."""
        share = np.broadcast_to(np.asarray(alpha, np.float32), (self.size, self.size))
        touched = share > 0
        self.fractions[:, touched] *= 1 - share[touched]
        for material, part in mix.items():
            self.fractions[material][touched] += part * share[touched]
        if code is not None:
            self.land_cover[share > 0.5] = code

    def distance_to(self, points: npt.NDArray[np.float64]) -> Floats:
        """Pixels from every pixel centre to the nearest of densely set `points` (n, 2) of x and y."""
        cells = np.rint(points).astype(int)
        inside = ((cells >= 0) & (cells < self.size)).all(axis=1)
        cells, points = cells[inside], points[inside]
        far = np.ones((self.size, self.size), bool)
        exact = np.zeros((2, self.size, self.size), np.float32)
        far[cells[:, 1], cells[:, 0]] = False
        exact[:, cells[:, 1], cells[:, 0]] = points.T
        if far.all():
            return np.full(far.shape, np.inf, np.float32)
        rows, cols = ndimage.distance_transform_edt(far, return_distances=False, return_indices=True)
        return np.asarray(np.hypot(self.x - exact[0, rows, cols], self.y - exact[1, rows, cols]), np.float32)


def smooth_noise(rng: np.random.Generator, size: int, wavelength: float, roughness: float = 3.0) -> Floats:
    """Draw a periodic field (size, size), mean 0, deviation 1; `wavelength` in pixels, more roughness is smoother."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    amplitude = (1 + ((fy**2 + fx**2) * wavelength**2)) ** (-roughness / 2)
    amplitude[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * amplitude, s=(size, size))
    return np.asarray(field / field.std(), np.float32)


def uniform(ids: npt.ArrayLike, salt: int) -> Floats:
    """Give each id its own number in [0, 1) (splitmix64), so that attributes need no table of ids."""
    z = np.asarray(ids, np.int64).astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((z ^ (z >> np.uint64(31))) >> np.uint64(40)) / 2**24, np.float32)


def _covered(distance: Floats, width: float) -> Floats:
    """Share of a pixel that a line of `width` pixels covers at `distance` from its axis."""
    return np.asarray(np.clip(width / 2 + 0.5 - distance, 0, min(1, width)), np.float32)


def _meander(size: int, width: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Points along a river from west to east: a sine-generated curve (Langbein & Leopold 1966), bent by noise."""
    step, wavelength = 0.4, 14 * width
    s = np.arange(0, 3.2 * size, step)
    sway = 1.25 + 0.35 * np.sin(2 * np.pi * s / (4.3 * wavelength) + rng.uniform(0, 6))
    drift = 0.35 * np.sin(2 * np.pi * s / (2.1 * size) + rng.uniform(0, 6))
    heading = sway * np.sin(2 * np.pi * s / (1.6 * wavelength) + rng.uniform(0, 6)) + drift
    x, y = np.cumsum(np.cos(heading)) * step, np.cumsum(np.sin(heading)) * step
    crossing = x < 1.1 * size
    y += rng.uniform(0.52, 0.62) * size - y[crossing].mean()
    return np.stack([x - 0.03 * size, y], axis=1)


def _paint_fields(g: _Ground) -> None:
    """Lay out blocks of land, each cut into parcels in its own direction, with lanes and hedges in between."""
    pitch = g.px(750)
    n = int(np.ceil(g.size / pitch)) + 4
    sites = (
        np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) - 2 + g.rng.uniform(0, 1, (n * n, 2))
    ) * pitch
    margin = int(2 * pitch)
    canvas = np.ones((g.size + 2 * margin,) * 2, bool)
    cells = np.clip(np.rint(sites[:, ::-1] + margin).astype(int), 0, canvas.shape[0] - 1)
    owner = np.zeros(canvas.shape, np.int64)
    canvas[cells[:, 0], cells[:, 1]], owner[cells[:, 0], cells[:, 1]] = False, np.arange(n * n) + 1
    rows, cols = ndimage.distance_transform_edt(canvas, return_distances=False, return_indices=True)
    bend_y, bend_x = (g.px(60) * g.noise(900) for _ in range(2))
    at = (
        np.clip(np.rint(v + b + margin), 0, canvas.shape[0] - 1).astype(int) for v, b in ((g.y, bend_y), (g.x, bend_x))
    )
    block = owner[rows, cols][tuple(at)]

    angle = np.pi * uniform(block, 1)
    along = np.cos(angle) * g.x + np.sin(angle) * g.y
    across = np.cos(angle) * g.y - np.sin(angle) * g.x
    length, width = g.px(220) + g.px(260) * uniform(block, 2), g.px(60) + g.px(110) * uniform(block, 3)
    v = across / width
    strip = np.floor(v).astype(np.int64) + 50_000
    strip_id = block * 200_003 + strip
    u = along / length + 7 * uniform(strip_id, 4)
    g.parcel = strip_id * 20_011 + np.floor(u).astype(np.int64) + 10_000
    to_edge = np.minimum(_from_edge(u) * length, _from_edge(v) * width)

    pasture = uniform(g.parcel, 5) < 0.16 + 0.5 * np.exp(-g.river / g.px(260)) + 0.18 * (g.hills > 0.8) + 0.3 * (
        uniform(block, 6) > 0.85
    )
    g.paint({Material.GRASS: 1}, pasture, GRASSLAND)
    g.paint({Material.GRASS: 0.8, Material.BROADLEAF: 0.2}, 0.45 * _covered(to_edge, 0.9))

    changes = np.zeros(block.shape, bool)
    changes[:, :-1] |= block[:, :-1] != block[:, 1:]
    changes[:-1] |= block[:-1] != block[1:]
    gap, (rows, cols) = ndimage.distance_transform_edt(~changes, return_indices=True)
    beyond = ndimage.maximum_filter(block, 3)[rows, cols] * 100_003 + ndimage.minimum_filter(block, 3)[rows, cols]
    kind = uniform(beyond, 7)
    g.paint({Material.BROADLEAF: 0.8, Material.GRASS: 0.2}, 0.6 * _covered(gap.astype(np.float32), 1.2) * (kind > 0.7))
    g.paint({Material.CONCRETE: 0.5, Material.GRAVEL: 0.5}, 0.5 * _covered(gap.astype(np.float32), 0.8) * (kind < 0.45))


def _from_edge(t: Floats) -> Floats:
    """Distance of each value to the nearest whole number."""
    return np.abs(t - np.rint(t))


def _paint_woods(g: _Ground, towns: _Towns) -> None:
    """Grow forest on the hills and in patches, with a ragged edge; conifers on the higher ground."""
    near_town = np.clip(1 + towns.inside / g.px(500), 0, 1)
    score = g.noise(1300, 3.2) + 0.55 * g.hills - 1.2 * near_town + 0.06 * g.noise(60, 2.0)
    copse = (uniform(g.parcel, 11) < 0.035) & (towns.inside < -g.px(200))
    woods = (score > np.quantile(score, 0.76)) | copse
    needles = 1 / (1 + np.exp(-3 * (g.noise(700) + 0.5 * g.hills - 0.1)))
    g.paint({Material.BROADLEAF: 1}, woods, FOREST)
    g.paint({Material.CONIFER: 1}, 0.9 * woods * needles)
    riparian = (g.river < g.px(85)) & (g.noise(260) > 0.55)
    g.paint({Material.BROADLEAF: 1}, riparian, FOREST)


def _paint_pits(g: _Ground, towns: _Towns, roads: dict[float, Floats]) -> None:
    """Put a lake and a gravel pit with its pond in every column of the grid of towns, clear of all else."""
    ragged = g.noise(450)
    reach = min(g.px(1150), 0.17 * g.size)
    room = np.minimum.reduce([-towns.inside, g.river, *roads.values()])
    for column in range(towns.columns):
        for kind, radius in (("pit", 0.34 * reach), ("lake", (0.5 if column % 2 else 0.36) * reach)):
            x = (column + g.rng.uniform(0.15, 0.85, 60)) * g.size / towns.columns
            y = g.rng.uniform(0.12, 0.88, 60) * g.size
            best = np.argmax(np.minimum(room[y.astype(int), x.astype(int)], 1.6 * radius))
            away = np.hypot(g.x - x[best], g.y - y[best])
            room = np.minimum(room, away - radius)
            shape = away / radius + 0.18 * ragged
            if kind == "pit":
                g.paint({Material.GRAVEL: 1}, np.clip((1 - shape) * radius + 0.5, 0, 1), BARE)
                g.paint({Material.SHALLOWS: 1}, shape < 0.4, WATER)
            else:
                g.paint({Material.GRASS: 0.4, Material.BROADLEAF: 0.6}, shape < 1.12, GRASSLAND)
                g.paint({Material.WATER: 1}, np.clip((1 - shape) * radius + 0.5, 0, 1), WATER)


def _paint_river(g: _Ground) -> None:
    """Lay the river, wider and narrower, with gravel bars and a strip of grass beside it."""
    half = g.px(36) * (1 + 0.22 * g.noise(700))
    g.paint(
        {Material.GRASS: 0.9, Material.BROADLEAF: 0.1},
        (g.river < half + g.px(22)) & (g.land_cover != FOREST),
        GRASSLAND,
    )
    bars = np.clip(half + g.px(24) - g.river + 0.5, 0, 1) * (g.noise(330) > 0.9)
    g.paint({Material.GRAVEL: 0.9, Material.GRASS: 0.1}, bars, BARE)
    g.paint({Material.WATER: 0.6, Material.SHALLOWS: 0.4}, np.clip(half - g.river + 0.5, 0, 1), WATER)


@dataclass(frozen=True)
class _Towns:
    centres: npt.NDArray[np.float64]  # (n, 2) of x and y, row by row of a grid
    columns: int
    inside: Floats  # pixels inward of the nearest town's edge, negative outside
    nearest: Ints


def _towns(g: _Ground) -> _Towns:
    """Settlements on a shaken grid, off the river: a town, then villages."""
    columns = max(2, round(g.size * g.resolution / 5000))
    cell = g.size / columns
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(columns)), -1).reshape(-1, 2)
    centres = (grid + g.rng.uniform(0.3, 0.7, grid.shape)) * cell
    radii = np.resize([0.26, 0.12, 0.15, 0.24, 0.10, 0.17], len(centres)) * min(cell, g.px(4200))
    ragged = 1 + 0.30 * g.noise(800)
    inside = np.stack([r * ragged - np.hypot(g.x - cx, g.y - cy) for (cx, cy), r in zip(centres, radii, strict=True)])
    return _Towns(centres, columns, inside.max(axis=0), inside.argmax(axis=0))


def _paint_towns(g: _Ground, towns: _Towns) -> None:
    """Build street blocks of lots with houses and gardens, works with large roofs, and parks."""
    urban = (towns.inside > 0) & (g.land_cover != WATER)
    turn = 0.2 + 1.2 * uniform(towns.nearest, 21)
    bend = g.px(16) * g.noise(700)
    p = (np.cos(turn) * g.x + np.sin(turn) * g.y + bend) / g.px(100)
    q = (np.cos(turn) * g.y - np.sin(turn) * g.x + bend) / g.px(140)
    block = (np.floor(p).astype(np.int64) + 5000) * 10_007 + np.floor(q).astype(np.int64) + 5000
    kind = uniform(block, 22)
    dense = np.clip(towns.inside / g.px(450), 0, 1) * 0.5 + 0.2 * uniform(block, 23)

    garden = {Material.GRASS: 0.5, Material.BROADLEAF: 0.32, Material.CONCRETE: 0.18}
    g.paint(garden, urban, BUILT)
    g.paint({Material.CONCRETE: 0.4, Material.ASPHALT: 0.6}, urban * dense)
    lot_p, lot_q = p * 4, q * 5
    lot = block * 64 + (np.floor(lot_p) % 4).astype(np.int64) * 8 + (np.floor(lot_q) % 5).astype(np.int64)
    house = (np.minimum(_from_edge(lot_p), _from_edge(lot_q)) > 0.16) & (uniform(lot, 24) > 0.22 - 0.2 * dense)
    roof = uniform(lot, 25)
    for material, low, high in (
        (Material.TILE, 0, 0.55),
        (Material.CONCRETE, 0.55, 0.85),
        (Material.METAL, 0.85, 0.9),
        (Material.ASPHALT, 0.9, 1),
    ):
        g.paint({material: 1}, 0.75 * (urban & house & (roof >= low) & (roof < high)), BUILT)

    works = urban & (kind < 0.13)
    hall = np.minimum(_from_edge(p), _from_edge(q)) > 0.2
    g.paint({Material.ASPHALT: 0.5, Material.CONCRETE: 0.5}, works, BUILT)
    g.paint({Material.METAL: 0.5, Material.CONCRETE: 0.5}, works & hall & (kind < 0.07))
    g.paint({Material.CONCRETE: 0.75, Material.TILE: 0.25}, works & hall & (kind >= 0.07))
    g.paint({Material.GRASS: 0.7, Material.BROADLEAF: 0.3}, urban & (kind > 0.94), GRASSLAND)

    lines = ((p, g.px(100), 3), (q, g.px(140), 2))
    for line, pitch, every in lines:
        main = np.rint(line).astype(np.int64) % every == 0
        away = _from_edge(line) * pitch
        g.paint({Material.ASPHALT: 0.85, Material.CONCRETE: 0.15}, urban * main * _covered(away, g.px(18)), ROAD)
        g.paint({Material.ASPHALT: 0.8, Material.CONCRETE: 0.2}, urban * ~main * 0.45 * _covered(away, g.px(8)))


def _roads(g: _Ground, towns: _Towns) -> dict[float, Floats]:
    """Width in metres -> distance to such roads: from each town to its neighbours and, at the rim, out of sight."""
    n = towns.columns
    points: dict[float, list[npt.NDArray[np.float64]]] = {28.0: [], 19.0: []}
    for i, start in enumerate(towns.centres):
        row, column = divmod(i, n)
        width = 28.0 if row == 0 else 19.0
        east = towns.centres[i + 1] if column < n - 1 else start * [0, 1] + g.size * np.array([1.05, 0.1])
        south = towns.centres[i + n] if row < n - 1 else start * [1, 0] + g.size * np.array([-0.08, 1.05])
        points[width].append(_curve(start, east, g.rng))
        points[19.0].append(_curve(start, south, g.rng))
        if column == 0:
            points[width].append(_curve(start, start * [0, 1] - 0.05 * g.size, g.rng))
        if row == 0:
            points[19.0].append(_curve(start, start * [1, 0] - 0.05 * g.size, g.rng))
    return {width: g.distance_to(np.concatenate(curves)) for width, curves in points.items()}


def _paint_roads(g: _Ground, roads: dict[float, Floats]) -> None:
    for width, away in roads.items():
        verge = _covered(away, g.px(width + 16)) * (g.land_cover != BUILT) * (g.land_cover != WATER)
        g.paint({Material.GRASS: 1}, 0.5 * verge)
        g.paint({Material.ASPHALT: 0.8, Material.CONCRETE: 0.2}, _covered(away, g.px(width)), ROAD)


def _curve(a: npt.NDArray[np.float64], d: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Points every quarter pixel along a cubic Bezier curve from `a` to `d`, bowed at random."""
    span = d - a
    normal = np.array([-span[1], span[0]])
    b, c = a + span / 3 + normal * rng.uniform(-0.22, 0.22), a + 2 * span / 3 + normal * rng.uniform(-0.22, 0.22)
    t = np.linspace(0, 1, int(4 * np.hypot(*span)) + 2)[:, None]
    return np.asarray((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d)
