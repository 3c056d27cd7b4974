"""Chips as other days, skies and places would show them; whole batches at once, on any device.

Labels move with their pixels, nodata stays nodata, and everything random comes from one generator: the same seed gives
the same batch again, to the bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812  what every torch code base calls it

from s2seg.errors import InputError

IGNORE_INDEX = 255
"""The label of pixels that do not count."""

_DN = 10_000.0  # stored numbers per unit of reflectance
_SATURATED = 65_535.0  # what uint16 holds

# centre wavelengths of Sentinel-2A's bands in micrometres, by STAC common name
_WAVELENGTHS = {
    **{"coastal": 0.443, "blue": 0.492, "green": 0.560, "red": 0.665},
    **{"rededge1": 0.704, "rededge2": 0.741, "rededge3": 0.783},
    **{"nir": 0.833, "nir08": 0.865, "nir09": 0.945, "swir16": 1.614, "swir22": 2.202},
}
_UNKNOWN = 0.783  # the middle one: neither as hazy as blue nor as clear as the short-wave infrared
_ICE_ABSORBS = 1.3  # beyond this wavelength clouds are darker

_RARE = 0.1  # classes that together make up no more than this are worth copying
_BLUR = (0.5, 1.5)  # standard deviation in pixels
_HAZE = (0.03, 0.25)  # optical thickness at 0.55 micrometres where the haze is thickest
_AIRLIGHT = 0.35  # reflectance of haze that nothing shines through
_ANGSTROM = 1.3  # exponent of continental aerosol
_COVER = (0.05, 0.4)  # share of a chip that clouds cover
_BRIGHTNESS = (0.4, 0.9)  # reflectance of clouds in the visible
_SHADOW = 0.6  # share of the light that a cloud's shadow lacks
_OPAQUE = 0.5  # opacity from which the ground cannot be told


@dataclass(frozen=True)
class AugmentSpec:
    """How much of what; the defaults of everything but ``flips`` are off.

    Parameters
    ----------
    flips
        One of the eight ways to lay a square chip down (four, where it is not square).
    scale
        Smallest and largest zoom, such as ``(0.8, 1.25)``, or None. What a zoom below 1 lacks is mirrored.
    gain
        Standard deviation of the logarithm of a factor that all bands of a chip share, and of half that for each band.
    offset
        Standard deviation of what is added to each band of a chip, in reflectance.
    noise
        Standard deviation of what is added to each value, in reflectance.
    blur, haze, clouds
        Share of the chips that are blurred, hazy, partly clouded. Of chips with several dates (bands such as
        ``red@spring``) one date is. A pixel loses its label where an opaque cloud hides its only date.
    band_dropout
        Share of the chips in which one band tells nothing: its valid pixels hold the band's mean over the batch.
    cutmix
        Share of the chips in which a rectangle is another chip's.
    copy_paste
        Share of the chips that get another chip's pixels of the rarest classes.
    mixed_dates
        Share of the chips in which a rectangle is of another date of the same place. Which pixels these are only the
        chips' store knows, so :class:`s2seg.training.data.MixedChips` does it, before everything else.

    Raises
    ------
    InputError
        For a share outside 0 to 1, a negative deviation, or a zoom that is not two positive numbers in order.
    """

    flips: bool = True
    scale: tuple[float, float] | None = None
    gain: float = 0.0
    offset: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    band_dropout: float = 0.0
    haze: float = 0.0
    clouds: float = 0.0
    cutmix: float = 0.0
    copy_paste: float = 0.0
    mixed_dates: float = 0.0

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise InputError(f"augment.scale: {list(self.scale)} is no range of zooms; write one such as [0.8, 1.25]")
        for name in ("gain", "offset", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"augment.{name}: {getattr(self, name)} is not a number of zero or more")
        for name in ("blur", "band_dropout", "haze", "clouds", "cutmix", "copy_paste", "mixed_dates"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name}: {getattr(self, name)} is not a share from 0 to 1")

    def __str__(self) -> str:
        """What is on, such as ``flips, scale 0.8-1.25, gain 0.1``, or ``none``."""
        texts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value is True:
                texts.append(f.name)
            elif isinstance(value, tuple):
                texts.append(f"{f.name} {value[0]:g}-{value[1]:g}")
            elif value:
                texts.append(f"{f.name} {value:g}")
        return ", ".join(texts) or "none"


class Augment:
    """Change batches of chips as a spec says.

    Parameters
    ----------
    spec
        How much of what.
    bands
        STAC common names of the channels, with ``@`` and a season where there are several dates. Haze and clouds
        follow the wavelength; names without one get a middling share.
    frequencies
        Share of the labelled pixels (or counts) per class channel, which says what ``copy_paste`` calls rare: as many
        of the rarest classes as make up no more than a tenth together, and at least one.

    Raises
    ------
    InputError
        If ``copy_paste`` is on and no class has a frequency.
    """

    def __init__(self, spec: AugmentSpec, bands: Sequence[str], frequencies: Sequence[float] | None = None) -> None:
        self.spec, self.bands = spec, tuple(bands)
        shares = [float(f) for f in (() if frequencies is None else frequencies)]
        if spec.copy_paste and not any(shares):
            raise InputError("augment.copy_paste: no class frequencies are known, so none is rare; set it to 0")
        names = [band.partition("@")[0] for band in bands]
        seasons = [band.partition("@")[2] for band in bands]
        order = list(dict.fromkeys(seasons))
        self._rare = torch.tensor(_rarest(shares), dtype=torch.long)
        self._wavelength = torch.tensor([_WAVELENGTHS.get(name, _UNKNOWN) for name in names])
        self._date = torch.tensor([order.index(season) for season in seasons])
        self._dates = len(order)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Change one batch; what is given stays as it is.

        Parameters
        ----------
        images
            (n, band, h, w) stored numbers, uint16 or float32: reflectance * 10000, 0 for nodata.
        labels
            (n, h, w) int64 channel indices, :data:`IGNORE_INDEX` where there is none.
        generator
            Where chance comes from, on the CPU or on the images' device.

        Returns
        -------
        Tensor, Tensor
            Images (n, band, h, w) float32, still in stored numbers, not rounded: what is 0 is 0 in the input, and
            everything else is between 1 and 65535, so that they scale as :meth:`ModelSpec.affine` scales what a model
            sees later. Labels as given, and :data:`IGNORE_INDEX` where any band is 0, which is where a map has nodata.
        """
        spec, chance = self.spec, _Chance(generator, len(images), images.device)
        images = images.to(torch.float32, copy=True)
        # before anything moves, so that no step carries a label of nodata elsewhere
        labels = torch.where((images != 0).all(1), labels, IGNORE_INDEX)
        if spec.flips:
            images, labels = _lay_down(images, labels, chance)
        if spec.scale is not None:
            images, labels = _zoom(images, labels, spec.scale, chance)
        if spec.copy_paste:
            images, labels = self._copy_paste(images, labels, chance)
        if spec.cutmix:
            images, labels = _cutmix(images, labels, spec.cutmix, chance)
        stored, changed = images != 0, images
        if spec.haze:
            changed = self._haze(changed, chance)
        if spec.clouds:
            changed, labels = self._clouds(changed, labels, chance)
        if spec.blur:
            changed = _blur(changed, stored.all(1), spec.blur, chance)
        changed = _calibrate(changed, spec, chance)
        if spec.band_dropout:
            changed = _drop_band(changed, stored, spec.band_dropout, chance)
        if changed is not images:
            changed = torch.where(stored, changed.clamp(1, _SATURATED), images)
        return changed, labels

    def _copy_paste(self, images: Tensor, labels: Tensor, chance: _Chance) -> tuple[Tensor, Tensor]:
        """Ghiasi et al. 2021, Simple Copy-Paste is a Strong Data Augmentation Method, arXiv:2012.07177."""
        rare = torch.zeros(IGNORE_INDEX + 1, dtype=torch.bool, device=labels.device)
        rare[self._rare.to(labels.device)] = True
        other, hit = chance.partner(), chance.hits(self.spec.copy_paste)
        return _paste(images, labels, other, rare[labels[other].long()] & hit[:, None, None])

    def _haze(self, images: Tensor, chance: _Chance) -> Tensor:
        """Light from the ground fades and airlight takes its place: ``I t + A (1 - t)``.

        Koschmieder's law as in He et al. 2009, Single Image Haze Removal Using Dark Channel Prior, eq. 1, with
        Angstrom's power law for the wavelength.
        """
        hit = self._dated(chance.hits(self.spec.haze), chance)
        spectrum = (self._wavelength.to(images.device) / 0.55) ** -_ANGSTROM
        thickness = chance.uniform(*_HAZE)[:, None, None, None] * chance.field(3, *images.shape[-2:])
        through = torch.exp(-thickness * (hit * spectrum)[:, :, None, None])
        return images * through + _AIRLIGHT * _DN * (1 - through)

    def _clouds(self, images: Tensor, labels: Tensor, chance: _Chance) -> tuple[Tensor, Tensor]:
        """Bright patches with soft edges, and their shadows to one side (one sun for the batch)."""
        height, width = images.shape[-2:]
        hit = self._dated(chance.hits(self.spec.clouds), chance)[:, :, None, None]
        away = max(1, min(height, width) // 4)
        sky = chance.field(4, height + away, width + away) + 0.4 * chance.field(16, height + away, width + away)
        cover = chance.uniform(*_COVER)
        opacity = torch.sigmoid((sky - _upper_quantile(sky, cover)) * 25)
        cloud, shadow = opacity[..., away:, away:], opacity[..., :height, :width]
        white = torch.where(self._wavelength.to(images.device) > _ICE_ABSORBS, 0.6, 1.0)
        bright = chance.uniform(*_BRIGHTNESS)[:, None, None, None] * white[:, None, None] * _DN
        lit = images * (1 - _SHADOW * hit * shadow)
        clouded = lit + hit * cloud * (bright - lit)
        if self._dates > 1:  # the other dates still show the ground
            return clouded, labels
        hidden = (cloud[:, 0] > _OPAQUE) & hit[:, 0].bool()
        return clouded, torch.where(hidden, IGNORE_INDEX, labels)

    def _dated(self, hit: Tensor, chance: _Chance) -> Tensor:
        """Which bands (n, band) an event of one date touches, 0 or 1."""
        date = (chance.uniform(0, 1) * self._dates).long().clamp_max(self._dates - 1)
        touched = self._date.to(hit.device) == date[:, None]
        return (touched & hit[:, None]).to(torch.float32)


class _Chance:
    """Random numbers for one batch, drawn where the generator lives and moved to where they are needed."""

    def __init__(self, generator: Generator, count: int, device: torch.device) -> None:
        self._generator, self._count, self._device = generator, count, device

    def normal(self, *shape: int) -> Tensor:
        """(n, *shape) of mean 0 and variance 1."""
        source = self._generator
        return torch.randn(self._count, *shape, generator=source, device=source.device).to(self._device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(n, *shape) between the two."""
        source = self._generator
        unit = torch.rand(self._count, *shape, generator=source, device=source.device).to(self._device)
        return low + (high - low) * unit

    def hits(self, share: float) -> Tensor:
        """(n,) bool: for each chip whether it happens."""
        return self.uniform(0, 1) < share

    def below(self, limit: int) -> Tensor:
        """(n,) int64 from 0 to ``limit - 1``."""
        source = self._generator
        return torch.randint(limit, (self._count,), generator=source, device=source.device).to(self._device)

    def partner(self) -> Tensor:
        """(n,) int64: for each chip another one, or itself where there is no other."""
        step = 1 + self.below(max(1, self._count - 1))
        return (torch.arange(self._count, device=self._device) + step) % self._count

    def field(self, knots: int, height: int, width: int) -> Tensor:
        """(n, 1, height, width) from 0 to 1, smooth between so many random values on a side."""
        coarse = self.uniform(0, 1, 1, knots, knots)
        return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)


# -- where pixels lie -------------------------------------------------------------------------------------------------


def _lay_down(images: Tensor, labels: Tensor, chance: _Chance) -> tuple[Tensor, Tensor]:
    """Turn and mirror: the symmetries of the square, or those that keep a rectangle's sides."""
    turns = (0, 1, 2, 3) if images.shape[-1] == images.shape[-2] else (0, 2)
    ways = [(turn, mirrored) for turn in turns for mirrored in (False, True)]
    choice = chance.below(len(ways))
    moved = torch.empty_like(images), torch.empty_like(labels)
    for i, (turn, mirrored) in enumerate(ways):
        chips = (choice == i).nonzero()[:, 0]  # eight moves for the batch instead of one for each chip
        for values, target in zip((images, labels), moved, strict=True):
            some = torch.rot90(values[chips], turn, (-2, -1))
            target[chips] = some.flip(-1) if mirrored else some
    return moved


def _zoom(images: Tensor, labels: Tensor, scale: tuple[float, float], chance: _Chance) -> tuple[Tensor, Tensor]:
    """Look at a smaller or larger cut of each chip, somewhere in it; what lies outside is mirrored."""
    low, high = scale
    size = torch.exp(-chance.uniform(math.log(low), math.log(high)))  # of the cut, in sides of the chip
    grid = _grid(size, chance, *images.shape[-2:])

    def sample(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values, grid, mode=mode, padding_mode="reflection", align_corners=False)

    valid = (images != 0).all(1, keepdim=True)
    nearest = sample(torch.cat([images, labels[:, None].to(images.dtype)], 1), "nearest")
    blended = sample(torch.cat([images * valid, valid.to(images.dtype)], 1), "bilinear")
    near, share = nearest[:, :-1], blended[:, -1:]
    # valid is what is nearest to a valid pixel, which therefore has at least a quarter of the weight
    ok = (near != 0).all(1, keepdim=True)
    zoomed = torch.where(ok, blended[:, :-1] / share.clamp_min(0.1), near)
    return zoomed, nearest[:, -1].to(labels.dtype)


def _grid(size: Tensor, chance: _Chance, height: int, width: int) -> Tensor:
    """Where to sample (n, h, w, 2) as x and y from -1 to 1; no affine_grid, whose matrix product autocast rounds."""
    x, y = (
        chance.uniform(-1, 1, 1) * (1 - size[:, None]).abs()
        + size[:, None] * ((torch.arange(n, device=size.device) + 0.5) * (2 / n) - 1)
        for n in (width, height)
    )
    return torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)


def _cutmix(images: Tensor, labels: Tensor, share: float, chance: _Chance) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, CutMix, arXiv:1905.04899, with the rectangle's area uniform from nothing to all."""
    height, width = images.shape[-2:]
    side = chance.uniform(0, 1).sqrt() * chance.hits(share)

    def inside(size: int) -> Tensor:
        centre = chance.uniform(0, 1)[:, None] * size
        return (torch.arange(size, device=images.device) + 0.5 - centre).abs() < side[:, None] * size / 2

    return _paste(images, labels, chance.partner(), inside(height)[:, :, None] & inside(width)[:, None, :])


def _paste(images: Tensor, labels: Tensor, other: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and labels of other chips (n,) where (n, h, w) says so."""
    return torch.where(where[:, None], images[other], images), torch.where(where, labels[other], labels)


def _rarest(frequencies: Sequence[float]) -> list[int]:
    """Channels of the rarest classes that together are no more than a tenth; at least one of those that occur."""
    present = sorted((f, i) for i, f in enumerate(frequencies) if f > 0)
    total, so_far = sum(frequencies), 0.0
    rare: list[int] = []
    for frequency, i in present:
        so_far += frequency
        if rare and so_far > _RARE * total:
            break
        rare.append(i)
    return rare


# -- what pixels hold -------------------------------------------------------------------------------------------------


def _calibrate(images: Tensor, spec: AugmentSpec, chance: _Chance) -> Tensor:
    """Gain, offset and noise of a sensor."""
    bands, height, width = images.shape[1:]
    if spec.gain:
        images = images * torch.exp(spec.gain * (chance.normal(1, 1, 1) + 0.5 * chance.normal(bands, 1, 1)))
    if spec.offset:
        images = images + spec.offset * _DN * chance.normal(bands, 1, 1)
    if spec.noise:
        images = images + spec.noise * _DN * chance.normal(bands, height, width)
    return images


def _blur(images: Tensor, valid: Tensor, share: float, chance: _Chance) -> Tensor:
    """Gaussian blur of some chips, over valid pixels only."""
    hit, sigma = chance.hits(share), chance.uniform(*_BLUR)
    chips = hit.nonzero()[:, 0]
    if not len(chips):
        return images
    weight = valid[chips, None].to(images.dtype)
    spread = _smooth(torch.cat([images[chips] * weight, weight], 1), sigma[chips])
    return images.index_copy(0, chips, spread[:, :-1] / spread[:, -1:].clamp_min(1e-3))


def _smooth(values: Tensor, sigma: Tensor) -> Tensor:
    """Convolve (n, c, h, w) with a Gaussian of its own for each chip, cut off at three pixels."""
    radius = 3
    steps = torch.arange(-radius, radius + 1, device=values.device)
    taps = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    for axis in (-2, -1):
        size = values.shape[axis]
        padded = F.pad(values, (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius))
        values = sum(
            (padded.narrow(axis, i, size) * taps[:, i, None, None, None] for i in range(2 * radius + 1)),
            start=torch.zeros_like(values),
        )
    return values


def _drop_band(images: Tensor, stored: Tensor, share: float, chance: _Chance) -> Tensor:
    """Replace one band of some chips by its mean over the batch, which tells nothing and is not nodata."""
    over = (0, 2, 3)
    mean = (images * stored).sum(over) / stored.sum(over).clamp_min(1)
    bands = torch.arange(images.shape[1], device=images.device)
    dropped = (bands == chance.below(len(bands))[:, None]) & chance.hits(share)[:, None]
    return torch.where(dropped[:, :, None, None], mean[:, None, None], images)


def _upper_quantile(values: Tensor, share: Tensor) -> Tensor:
    """The level (n, 1, 1, 1) that a share (n,) of each chip's values (n, 1, h, w) lies above, from every 16th value."""
    ordered = values[..., ::4, ::4].flatten(1).sort(dim=1, descending=True).values
    at = (share * (ordered.shape[1] - 1)).long()
    return ordered.gather(1, at[:, None])[:, :, None, None]
