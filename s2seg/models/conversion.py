"""Write a network as ONNX, TorchScript or OpenVINO, and open what was written; who calls compares the answers.

All three take what the stack stores and do the scaling themselves: numbers such that reflectance is number x scale
(for Sentinel-2 number / 10000), as float32 (batch, band, y, x), any batch and any sides that are multiples of the
network's stride. They return scores per class as float32 (batch, class, y, x); channel ``i`` means the legend's class
``i``. What the channels are is written into each file.
"""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Kind = Literal["onnx", "torchscript", "openvino"]
KINDS: tuple[str, ...] = get_args(Kind)
Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""A converted network: stored numbers in, scores out."""

REFUSALS = (RuntimeError, ValueError, TypeError)
"""What converters raise about a network that they cannot convert; torch's own errors derive from it."""

_NEEDS = {"onnx": ("onnx", "onnxscript"), "torchscript": (), "openvino": ("openvino",)}
_OPSET = 18  # the oldest that torch's exporter writes without converting back
_OPERATOR = re.compile(r"\b(?:aten|prim|torchvision|quantized)(?:::|\.)\w+(?:\.\w+)?")


class ConversionError(ModelError):
    """The network, sound in itself, cannot be had in another form: an operator is unknown, or the answers differ."""


def check_packages(bundle: ModelBundle, kind: str) -> None:
    """Raise a ModelError if a model is not one that can be converted, or a package is missing that does it."""
    if bundle.is_onnx:
        raise ModelError(bundle.path, "is an ONNX network already; only models with safetensors weights are exported")
    if extra := missing_extra(kind):
        raise ModelError(bundle.path, f"an export to {kind} needs more packages: pip install 's2seg[{extra}]'")


def missing_extra(kind: str) -> str | None:
    """Return the extra whose packages a conversion lacks here; None if it can be done."""
    for extra, modules in (("torch", ("torch", "segmentation_models_pytorch")), (kind, _NEEDS[kind])):
        if any(importlib.util.find_spec(module) is None for module in modules):
            return extra
    return None


def convert(bundle: ModelBundle, kind: str, file: Path, margin: int = 0) -> Run:
    """Write the network to ``file`` and open what was written.

    Parameters
    ----------
    bundle, kind, file
        A model with safetensors weights, one of :data:`KINDS`, and where it goes.
    margin
        Pixels on each side of a window that will be cut from the answer (OpenVINO).

    Raises
    ------
    ConversionError
        When the network has an operator that the other form lacks.
    """
    import torch

    network = scaled_network(bundle, tuned=kind == "openvino", margin=margin)
    try:
        with _quiet(), torch.no_grad():
            _CONVERTERS[kind](network, bundle, file, _example(bundle.spec, margin))
    except REFUSALS as error:
        raise ConversionError(bundle.path, f"cannot be converted to {kind}: {reason(error)}") from error
    return _OPENERS[kind](file)


def scaled_network(bundle: ModelBundle, tuned: bool, margin: int) -> torch.nn.Module:
    """Build the network with its weights, behind a layer that scales stored numbers.

    ``tuned`` changes its layers as the torch runtime does on a CPU; other programs shall find them as they were made.
    """
    import torch

    from s2seg.models.runtimes.pytorch import load_network
    from s2seg.models.runtimes.trimming import trim_decoder
    from s2seg.models.runtimes.tuning import fold_batch_norm, merge_upsampling, trial_side

    class Scale(torch.nn.Module):
        """Not a convolution: in bfloat16 that costs one pixel in a hundred its class, so coarse are its sums."""

        a: torch.Tensor
        b: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            for name, values in zip(("a", "b"), bundle.spec.affine(), strict=True):
                self.register_buffer(name, torch.from_numpy(values).reshape(-1, 1, 1))

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return numbers * self.a + self.b

    network = load_network(bundle)
    if tuned:
        bands, side = len(bundle.spec.bands), trial_side(bundle.spec)
        network = trim_decoder(merge_upsampling(fold_batch_norm(network, bands, side), bands, side), bands, margin)
    return torch.nn.Sequential(Scale(), network).eval()


def _example(spec: ModelSpec, margin: int) -> torch.Tensor:
    """Return an input in which no two sizes are alike, so that none is taken for another or for a constant."""
    import torch

    sides = (spec.window,) * 2 if spec.window else (2 * (spec.stride + margin), 3 * spec.stride + 2 * margin)
    return torch.ones(2, len(spec.bands), *sides)


def _free(spec: ModelSpec) -> dict[int, Any]:
    """Axes of the input whose size is free."""
    from torch.export import Dim

    return dict.fromkeys((0,) if spec.window else (0, 2, 3), Dim.DYNAMIC)


def _to_onnx(network: torch.nn.Module, bundle: ModelBundle, file: Path, example: torch.Tensor) -> None:
    import onnx
    import torch

    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=(_free(bundle.spec),),
        input_names=["numbers"],
        output_names=["scores"],
        opset_version=_OPSET,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch returned no network")
    model = program.model_proto
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]  # where in the source each operation was called: paths of this machine
    onnx.helper.set_model_props(model, _facts(bundle))
    onnx.save_model(model, file)


def _to_torchscript(network: torch.nn.Module, bundle: ModelBundle, file: Path, example: torch.Tensor) -> None:
    import torch

    traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
    whole = file.with_name("whole")
    torch.jit.save(traced, str(whole), _extra_files={"s2seg.json": json.dumps(_facts(bundle))})
    _drop_debug_records(whole, file)


def _drop_debug_records(whole: Path, file: Path) -> None:
    """Copy a TorchScript archive without the records that tell where on this machine its source code lies."""
    import torch

    reader, writer = torch._C.PyTorchFileReader(str(whole)), torch._C.PyTorchFileWriter(str(file))
    for name in reader.get_all_records():
        # the writer adds these two itself
        if not name.endswith(".debug_pkl") and name not in ("version", ".data/serialization_id"):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()


def _to_openvino(network: torch.nn.Module, bundle: ModelBundle, file: Path, example: torch.Tensor) -> None:
    import openvino
    import openvino.frontend

    from s2seg.models.unet import pools_globally

    # OpenVINO traces it: 3 s for a U-Net, where taking what torch.export makes needs 12 s
    try:
        model = openvino.convert_model(network, example_input=example)
    except openvino.frontend.OpConversionFailure as error:  # an Exception, and no more than that
        raise RuntimeError(str(error)) from error
    if bundle.spec.window:
        side = bundle.spec.window
        model.reshape([-1, len(bundle.spec.bands), side, side])
    facts = _facts(bundle) | {"pools_globally": str(pools_globally(network, *example.shape[1:3]))}
    for key, value in facts.items():
        model.set_rt_info(value, ["s2seg", key])
    openvino.save_model(model, str(file), compress_to_fp16=False)


def _open_onnx(file: Path) -> Run:
    from s2seg.models.runtimes import onnxrt

    session = onnxrt.start(file.name, file)

    def run(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        try:
            return np.asarray(session.run(["scores"], {"numbers": numbers})[0])
        except onnxrt.ERRORS as error:
            raise RuntimeError(onnxrt.one_line(error)) from error

    return run


def _open_torchscript(file: Path) -> Run:
    import torch

    with _quiet():
        network = torch.jit.load(str(file))  # type: ignore[no-untyped-call]

    def run(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(numbers)))

    return run


def _open_openvino(file: Path) -> Run:
    import openvino

    # a CPU with fast bfloat16 would use it unasked; the bound is about the conversion, not about the precision
    network = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda numbers: np.asarray(network(numbers)[0])


_CONVERTERS: dict[str, Callable[[torch.nn.Module, ModelBundle, Path, torch.Tensor], None]] = {
    "onnx": _to_onnx,
    "torchscript": _to_torchscript,
    "openvino": _to_openvino,
}
_OPENERS: dict[str, Callable[[Path], Run]] = {
    "onnx": _open_onnx,
    "torchscript": _open_torchscript,
    "openvino": _open_openvino,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what converters say of themselves, not of the network."""
    with warnings.catch_warnings():
        # still the only way to a TorchScript file
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        # tracing keeps one branch of each condition: the check at another size shows whether that matters
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        yield


def reason(error: Exception) -> str:
    """Name the operator where the message does; else its first line."""
    text = str(error).strip() or type(error).__name__
    line = textwrap.shorten(text.splitlines()[0], 200)
    operator = _OPERATOR.search(text)
    return f"the operator {operator[0]} ({line})" if operator else line


def _facts(bundle: ModelBundle) -> dict[str, str]:
    """What a stranger must know to run the file, as texts."""
    spec = bundle.spec
    return {
        "name": spec.name,
        "input": f"float32 (batch, band, y, x); reflectance is number x {spec.scale:g}, 0 is no data",
        "bands": ", ".join(spec.bands),
        "output": f"float32 (batch, class, y, x), {spec.activation}; channel i is class i of the legend",
        "legend": json.dumps(spec.legend.to_dict(), ensure_ascii=False),
        "stride": str(spec.stride),
        "window": "any multiple of the stride" if spec.window is None else str(spec.window),
        "model_sha256": bundle.sha256,
    }
