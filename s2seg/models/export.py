"""Take a model to other software: ONNX, TorchScript and OpenVINO, each checked against torch before it is kept.

What the files take and return is said in :mod:`s2seg.models.conversion`. The ONNX form is a bundle as well: its
``model.json`` says scale 1, mean 0 and deviation 1, which leaves the numbers as they are, so ``s2seg map --model`` runs
it with onnxruntime. The configuration of its training goes along, so that ``s2seg evaluate`` knows its test part.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError, OutputError
from s2seg.models.bundle import CONFIG_FILE, ModelBundle, check_replaceable, write_bundle
from s2seg.models.conversion import KINDS, REFUSALS, ConversionError, Kind, Run, check_packages, convert, reason
from s2seg.models.runtimes.answers import softmax
from s2seg.models.spec import ONNX, ModelSpec

AGREEMENT = 0.9999
"""Least share of pixels on which an export and torch must name the same class."""

_SUFFIXES = {"torchscript": ".pt", "openvino": ".xml"}
_BATCH = 8


@dataclass(frozen=True)
class Export:
    """A converted network that has passed its check.

    Parameters
    ----------
    path
        The bundle's folder (onnx), or the file; OpenVINO's weights lie beside it in a ``.bin``.
    kind
        ``onnx``, ``torchscript`` or ``openvino``.
    agreement
        Share of the pixels compared on which it names the same class as torch in float32.
    max_difference
        Greatest difference of a probability.
    pixels
        How many were compared.
    """

    path: Path
    kind: Kind
    agreement: float
    max_difference: float
    pixels: int


def export_model(
    bundle: ModelBundle,
    kind: Kind,
    path: str | Path,
    *,
    chips: npt.NDArray[np.uint16] | None = None,
    overwrite: bool = False,
) -> Export:
    """Convert a model, compare its answers with torch's, and write it only if they agree.

    Parameters
    ----------
    bundle
        A model with safetensors weights.
    kind
        ``onnx``: a bundle's folder with ``model.onnx``; ``torchscript``: a ``.pt`` file; ``openvino``: an ``.xml``
        file with its ``.bin``, in float32.
    path
        Where to write.
    chips
        Real pixels to compare on, (n, band, y, x) uint16 stored numbers, bands in the model's order, sides multiples
        of its stride; without them a synthetic landscape is made. They are compared as they are and, where the window
        is free, once more at another size.
    overwrite
        Replace an earlier export.

    Raises
    ------
    InputError
        For an unknown kind, a path that does not fit it, or chips that do not fit the model.
    ModelError
        When the network cannot be converted, a package is missing, or fewer than 99.99 % of the pixels agree.
        Nothing is left behind.
    OutputError
        When ``path`` exists or cannot be written.
    """
    target = _check_target(kind, path, overwrite)
    check_packages(bundle, kind)
    pixels = synthetic_pixels(bundle.spec) if chips is None else check_chips(bundle.spec, chips)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"model{_SUFFIXES.get(kind, '.onnx')}"
        run = convert(bundle, kind, file)
        comparison = _compare(bundle, run, pixels)
        comparison.check(bundle.path, kind)
        if kind == "onnx":
            write_bundle(
                target, _spec_of_export(bundle), lambda weights: _copy(bundle, file, weights), overwrite=overwrite
            )
        else:
            _publish(file, target)
    return Export(target, kind, comparison.agreement, comparison.max_difference, comparison.pixels)


def write_openvino(bundle: ModelBundle, file: Path, margin: int = 0) -> None:
    """Convert a model for the OpenVINO runtime: checked on a synthetic landscape, as an export without chips is.

    Parameters
    ----------
    bundle
        A model with safetensors weights.
    file
        Where to write: an ``.xml`` in a folder that exists; the weights go into a ``.bin`` beside it.
    margin
        Pixels on each side of a window that will be cut from the answer, which may lack some of them already; windows
        must be larger than two margins.

    Raises
    ------
    ConversionError
        When OpenVINO does not know an operator, or fewer than 99.99 % of the pixels agree with torch.
    """
    check_packages(bundle, "openvino")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tracing runs tiny windows, for which threads mostly wait for each other
    try:
        pixels = synthetic_pixels(bundle.spec, 4 * bundle.spec.stride + 2 * margin)
        comparison = _compare(bundle, convert(bundle, "openvino", file, margin), pixels, margin)
    finally:
        torch.set_num_threads(threads)
    comparison.check(bundle.path, "openvino")


def _check_target(kind: str, path: str | Path, overwrite: bool) -> Path:
    if kind not in KINDS:
        raise InputError(f"unknown kind of export {kind!r}: choose {', '.join(KINDS)}")
    target = Path(path).expanduser()
    if "://" in str(path):
        raise OutputError(str(path), "an export is written to a local path; copy it from there")
    if kind == "onnx":
        if target.suffix == ".onnx":
            raise InputError(f"{path}: an ONNX export is a folder with model.onnx in it; give a name without .onnx")
        check_replaceable(target.resolve(), overwrite)
    elif target.suffix != _SUFFIXES[kind]:
        raise InputError(f"{path}: with --kind {kind} a file is written, whose name must end in {_SUFFIXES[kind]}")
    elif target.exists() and not overwrite:
        raise OutputError(str(path), "it exists already; pass --overwrite (overwrite=True) or choose another path")
    return target


def check_chips(spec: ModelSpec, chips: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return (n, band, y, x) uint16 stored numbers as they are, if a model can run on them.

    Raises
    ------
    InputError
        Which they should be: the model's bands, and its window or multiples of its stride.
    """
    if chips.ndim != 4 or chips.shape[1] != len(spec.bands) or not len(chips) or chips.dtype != np.uint16:
        raise InputError(
            f"chips are {chips.dtype} {chips.shape}; uint16 (n, {len(spec.bands)}, y, x) is needed, with at least one"
        )
    height, width = chips.shape[2:]
    if spec.window is not None and (height, width) != (spec.window, spec.window):
        raise InputError(f"chips of {height} x {width} px; the network takes {spec.window} x {spec.window} only")
    if height % spec.stride or width % spec.stride:
        raise InputError(f"chips of {height} x {width} px; sides must be multiples of the stride {spec.stride}")
    return chips


def synthetic_pixels(spec: ModelSpec, side: int | None = None) -> npt.NDArray[np.uint16]:
    """Make a landscape with the bands' own mean and spread, coarse and fine texture, and a corner without data.

    Returns four windows, (4, band, y, x), of a fixed network's own size, else ``side`` or four times the stride.
    """
    from scipy.ndimage import gaussian_filter

    side = spec.window or side or 4 * spec.stride
    noise = np.random.default_rng(0).standard_normal((4, len(spec.bands), side, side))
    texture = sum(gaussian_filter(noise, (0, 0, sigma, sigma), mode="wrap") * sigma for sigma in (1, 8))
    mean, std = (np.reshape(values, (-1, 1, 1)) / spec.scale for values in (spec.mean, spec.std))
    numbers = np.clip(np.rint(mean + 2 * std * texture), 1, 65535).astype(np.uint16)
    numbers[0, :, : side // 8, : side // 8] = 0
    return numbers


@dataclass(frozen=True)
class _Comparison:
    """How far an export and torch agree, summed over batches."""

    same: int = 0
    pixels: int = 0
    max_difference: float = 0.0

    @property
    def agreement(self) -> float:
        return self.same / self.pixels

    def add(self, expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> _Comparison:
        """Take in one batch of probabilities, (n, class, y, x) each."""
        difference = float(np.abs(expected - found).max())
        return _Comparison(
            self.same + int((expected.argmax(axis=1) == found.argmax(axis=1)).sum()),
            self.pixels + found[:, 0].size,
            # not max(): that would lose a NaN
            float(np.maximum(self.max_difference, difference)),
        )

    def check(self, path: str, kind: str) -> None:
        """Refuse what does not agree."""
        if not (self.agreement >= AGREEMENT and np.isfinite(self.max_difference)):
            raise ConversionError(
                path,
                f"the {kind} form names the same class as torch on {100 * self.agreement:.3f} % of {self.pixels} "
                f"pixels only (largest difference {self.max_difference:.2g}), below {100 * AGREEMENT:g} %, "
                "and was not written",
            )


def _compare(bundle: ModelBundle, run: Run, pixels: npt.NDArray[np.uint16], margin: int = 0) -> _Comparison:
    """Run torch in float32, as mapping does, and the export on the same pixels; ``margin`` does not count."""
    from s2seg.models.runtimes.pytorch import TorchSession

    torch_says = TorchSession(bundle, "cpu", "float32").probabilities
    comparison = _Comparison()
    for batch in _batches(bundle.spec, pixels):
        try:
            scores = run(batch.astype(np.float32))
        except REFUSALS as error:
            raise ConversionError(
                bundle.path, f"the converted network fails on an input of {batch.shape}: {reason(error)}"
            ) from error
        expected = _middle(torch_says(batch), batch.shape, margin)
        scores = _middle(scores, batch.shape, margin)
        if scores.shape != expected.shape:
            raise ConversionError(bundle.path, f"the converted network answers {scores.shape}, torch {expected.shape}")
        comparison = comparison.add(expected, softmax(scores) if bundle.spec.activation == "logits" else scores)
    return comparison


def _middle(answer: npt.NDArray[np.float32], window: tuple[int, ...], margin: int) -> npt.NDArray[np.float32]:
    """Cut (..., y, x) that may lack some of the margin already to what a window leaves within it."""
    cuts = [(have - seen + 2 * margin) // 2 for have, seen in zip(answer.shape[-2:], window[-2:], strict=True)]
    down, across = (slice(cut, size - cut) for cut, size in zip(cuts, answer.shape[-2:], strict=True))
    return answer[..., down, across]


def _batches(spec: ModelSpec, pixels: npt.NDArray[np.uint16]) -> Iterator[npt.NDArray[np.uint16]]:
    yield from (pixels[i : i + _BATCH] for i in range(0, len(pixels), _BATCH))
    if spec.window is None:
        yield np.pad(pixels[:1], ((0, 0), (0, 0), (0, spec.stride), (0, 2 * spec.stride)), mode="wrap")


def _spec_of_export(bundle: ModelBundle) -> ModelSpec:
    """Describe the ONNX form: the same model, but for the scaling that is inside the graph now."""
    spec = bundle.spec
    origin = {
        "model": bundle.sha256,
        "architecture": dict(spec.architecture),
        "scale": spec.scale,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    return replace(
        spec,
        architecture={"name": ONNX},
        scale=1.0,
        mean=(0.0,) * len(spec.bands),
        std=(1.0,) * len(spec.bands),
        provenance={**spec.provenance, "exported_from": origin},
    )


def _copy(bundle: ModelBundle, file: Path, target: Path) -> None:
    """Put the network at its place in a bundle, and the configuration of its training beside it, if there is one."""
    shutil.copyfile(file, target)
    if (bundle.folder / CONFIG_FILE).is_file():
        shutil.copyfile(bundle.folder / CONFIG_FILE, target.with_name(CONFIG_FILE))


def _publish(file: Path, target: Path) -> None:
    """Move a file, and the ``.bin`` that may belong to it, to their place; the file itself comes last."""
    parts = [part for part in (file.with_suffix(".bin"), file) if part.exists()]
    partials = {part: target.with_name(f".{target.stem}{part.suffix}.partial") for part in parts}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for part, partial in partials.items():
            shutil.copyfile(part, partial)
        for part, partial in partials.items():
            partial.replace(target.with_suffix(part.suffix))
    except OSError as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise OutputError(str(target), error.strerror or str(error)) from error
