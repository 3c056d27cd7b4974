"""Bring foreign ONNX networks in: check what they take and answer, and wrap them as bundles."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError, ModelError
from s2seg.legend import LandClass, Legend
from s2seg.models.bundle import ModelBundle, refuse_pickle, write_bundle
from s2seg.models.spec import ONNX, ModelSpec

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

_STRIDE = 32  # of nearly every encoder-decoder; the trial run shows whether sides of its multiples work

CSMASK_LEGEND = Legend(
    "csmask",
    (
        LandClass(1, "clear", "#8cb873"),
        LandClass(2, "cloud", "#f2f2f2"),
        LandClass(3, "shadow", "#4a4a66"),
    ),
    source="doi:10.1016/j.rse.2019.05.022",
)


def import_onnx(
    file: str | Path,
    output: str | Path,
    *,
    name: str,
    bands: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    legend: Legend,
    scale: float = 1e-4,
    activation: str = "logits",
    depth: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ModelBundle:
    """Wrap an ONNX segmentation network as a bundle, after running it once on noise.

    Parameters
    ----------
    file
        One self-contained ``.onnx`` file: input (batch, band, y, x) float32, output (batch, class, y, x).
    output
        The bundle's folder, to be made.
    name, bands, mean, std, legend, scale, activation
        As in :class:`s2seg.models.ModelSpec`.
    depth
        Context per side; by default 64, or an eighth of a fixed window.
    provenance
        Where it comes from: source, licence, citation.
    overwrite
        Replace a bundle that is there already.

    Raises
    ------
    ModelError
        When the network is not what the arguments say: another number of bands or classes, channels last, an answer
        of another size, probabilities instead of logits.
    """
    from s2seg.models.runtimes import onnxrt  # here: it loads onnxruntime

    path = Path(file).expanduser()
    if not path.is_file():
        raise ModelError(str(file), "there is no such file")
    refuse_pickle(str(file), path)
    with tempfile.TemporaryDirectory() as alone:  # where a network that needs other files cannot find them
        session = onnxrt.start(str(file), Path(shutil.copy(path, alone)))
    form = _check_input(str(file), session, len(bands))
    _check_answers(str(file), session, form, len(bands), legend, activation)
    graph = _graph(path)
    stride = _STRIDE if form.window is None or form.window % _STRIDE == 0 else 1
    spec = ModelSpec(
        name=name,
        bands=tuple(bands),
        legend=legend,
        mean=tuple(mean),
        std=tuple(std),
        architecture={"name": ONNX},
        scale=scale,
        activation=activation,
        stride=stride,
        depth=_default_depth(form.window, stride) if depth is None else depth,
        window=form.window,
        # without the package onnx the graph stays closed; a fixed window is then taken as a sign
        global_context=form.window is not None if graph is None else _sees_everything(graph),
        provenance=provenance or {},
    )
    return write_bundle(output, spec, lambda target: shutil.copyfile(path, target), overwrite=overwrite)


def import_csmask(
    output: str | Path,
    *,
    variant: str = "4-band",
    level: str = "l2a",
    overwrite: bool = False,
) -> ModelBundle:
    """Wrap a cloud and cloud shadow network of the package ukis-csmask (Wieland et al. 2019; Apache-2.0).

    U-Nets with an EfficientNet-B4 encoder for windows of 256 px, trained at about 30 m.

    Parameters
    ----------
    output
        The bundle's folder, to be made.
    variant
        ``4-band`` (blue, green, red, nir) or ``6-band`` (also swir16, swir22).
    level
        Surface (``l2a``) or top-of-atmosphere (``l1c``) reflectance.
    overwrite
        Replace a bundle that is there already.

    Raises
    ------
    ModelError
        When the package is not installed.
    """
    if variant not in ("4-band", "6-band") or level not in ("l2a", "l1c"):
        raise InputError(f"unknown csmask network {variant!r}, {level!r}: 4-band or 6-band, l2a or l1c")
    # found, not imported: only its data files are of interest
    found = importlib.util.find_spec("ukis_csmask")
    if found is None or not found.submodule_search_locations:
        raise ModelError("csmask", "the package ukis-csmask is not installed: pip install 's2seg[csmask]'")
    network = Path(found.submodule_search_locations[0]) / f"model_{variant[0]}b_{level}.onnx"
    if not network.is_file():
        raise ModelError("csmask", f"this version of ukis-csmask has no {network.name}: pip install 's2seg[csmask]'")
    facts = json.loads(network.with_suffix(".json").read_text())
    mean, std = facts["data"]["dataset_statistics"]["img"]
    return import_onnx(
        network,
        output,
        name=f"csmask {variant} {level}",
        bands=facts["data"]["dataset_statistics"]["band_names"],
        mean=mean,
        std=std,
        legend=CSMASK_LEGEND,
        provenance={
            "source": f"ukis-csmask {importlib.metadata.version('ukis-csmask')}, {network.name}",
            "version": facts["model"]["version"],
            "attribution": "German Aerospace Center (DLR)",
            "license": "Apache-2.0",
            "citation": "Wieland, Li, Martinis (2019), Remote Sensing of Environment 230, "
            "doi:10.1016/j.rse.2019.05.022",
            "resolution": "trained at about 30 m",
        },
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class _Form:
    """The shape of a network's input: None where it is free."""

    batch: int | None
    window: int | None


def _check_input(path: str, session: InferenceSession, bands: int) -> _Form:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ModelError(path, f"has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); one is needed")
    shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
    if len(shape) != 4:
        raise ModelError(path, f"input {_shown(shape)} has {len(shape)} dimensions; (batch, band, y, x) is needed")
    if inputs[0].type != "tensor(float)":
        raise ModelError(path, f"input is {inputs[0].type}; export the network with float32 inputs")
    batch, channels, height, width = shape
    if channels not in (None, bands):
        if width == bands:
            raise ModelError(path, f"input {_shown(shape)} has its channels last: export it as (batch, band, y, x)")
        raise ModelError(path, f"input {_shown(shape)} takes {channels} bands, but {bands} were named")
    if height != width:
        raise ModelError(path, f"input {_shown(shape)} is not square: export it with equal or with free sides")
    return _Form(batch, height)


def _check_answers(
    path: str, session: InferenceSession, form: _Form, bands: int, legend: Legend, activation: str
) -> None:
    """Run the network on noise and compare what comes back with what the caller says of it."""
    # two sides where they are free: an exporter can bake one into the graph
    for side in (form.window,) if form.window else (4 * _STRIDE, 5 * _STRIDE):
        scores = _trial(path, session, form.batch or 1, bands, side)
        if scores.ndim != 4:
            raise ModelError(path, f"answers {scores.shape}; scores per class are needed: (batch, class, y, x)")
        if scores.shape[2:] != (side, side):
            raise ModelError(path, f"answers {scores.shape[2:]} for a window of {(side, side)}; equal sizes are needed")
        if scores.shape[1] != len(legend):
            raise ModelError(path, f"answers {scores.shape[1]} classes, but legend {legend.name!r} has {len(legend)}")
    looks = _looks_like_probabilities(scores)
    if activation == "probabilities" and not looks:
        raise ModelError(path, "does not answer probabilities (0 to 1, summing to 1): use activation 'logits'")
    if activation == "logits" and looks:
        raise ModelError(path, "answers probabilities already: use activation 'probabilities'")


def _trial(path: str, session: InferenceSession, batch: int, bands: int, side: int) -> npt.NDArray[np.float32]:
    from s2seg.models.runtimes import onnxrt

    noise = np.random.default_rng(0).standard_normal((batch, bands, side, side), dtype=np.float32)
    try:
        scores: npt.NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: noise})[0]
    except onnxrt.ERRORS as error:
        raise ModelError(path, f"fails on an input of {noise.shape}: {onnxrt.one_line(error)}") from error
    return scores


def _looks_like_probabilities(scores: npt.NDArray[np.float32]) -> bool:
    return bool(scores.min() >= 0 and scores.max() <= 1 and np.allclose(scores.sum(axis=1), 1, atol=1e-3))


def _default_depth(window: int | None, stride: int) -> int:
    return 96 if window is None else min(64, window // 8 // stride * stride)


def _shown(shape: Sequence[int | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _graph(path: Path) -> onnx.ModelProto | None:
    """Read the graph where the package onnx is installed."""
    if not importlib.util.find_spec("onnx"):
        return None
    import onnx

    return onnx.load_model(path)


# attention, and norms that take their statistics from the window
_GLOBAL_OPS = {
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GlobalLpPool",
    "InstanceNormalization",
    "GroupNormalization",
    "Attention",
    "MultiHeadAttention",
}
_SPATIAL = {2, 3, -1, -2}


def _sees_everything(model: onnx.ModelProto) -> bool:
    """Whether any pixel of a window can change the answer at every other, by the operations in the graph."""
    nodes = list(_nodes(model))
    constants = _constants(model, nodes)
    answers = {output.name for output in model.graph.output}
    for node in nodes:
        if node.op_type in _GLOBAL_OPS:
            return True
        if node.op_type in ("ReduceMean", "ReduceMax", "ReduceSum") and _axes(node, constants) & _SPATIAL:
            return True
        if node.op_type == "Softmax" and not answers & set(node.output):
            return True  # inside the network it weighs places against each other: attention
    return False


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:  # what newer exporters fold layers into
        yield from function.node


def _constants(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> dict[str, npt.NDArray[Any]]:
    """Return the small integer tensors of a graph by name: axes among them."""
    import onnx

    tensors = {t.name: t for t in model.graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    whole = {name: t for name, t in tensors.items() if t.data_type == onnx.TensorProto.INT64}
    return {name: onnx.numpy_helper.to_array(t) for name, t in whole.items()}


def _axes(node: onnx.NodeProto, constants: Mapping[str, npt.NDArray[Any]]) -> set[int]:
    """Return the axes that a reduction runs over; all of them where the graph does not say."""
    for attribute in node.attribute:
        if attribute.name == "axes":
            return set(attribute.ints)
    if len(node.input) > 1 and node.input[1] in constants:
        return {int(axis) for axis in constants[node.input[1]].ravel()}
    return _SPATIAL
