"""Networks small enough to reason about, as bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2seg.legend import LandClass, Legend
from s2seg.models.bundle import ModelBundle
from s2seg.models.importing import import_onnx

LEGEND = Legend(
    "tiny", (LandClass(10, "dark", "#102030"), LandClass(20, "bright", "#c0b0a0"), LandClass(30, "mixed", "#00ff00"))
)


def tiny_onnx(
    folder: Path,
    bands: tuple[str, ...] = ("blue", "green", "red", "nir"),
    *,
    kernel: int = 5,
    window: int | None = None,
) -> ModelBundle:
    """Two convolutions with random weights: each answer depends on ``2 * kernel - 1`` pixels across.

    ``window`` makes it a fixed-size network, which is predicted with a blend.
    """
    rng = np.random.default_rng(7)
    hidden, side = 8, window or "side"
    weights = {
        "w1": rng.normal(0, 0.4, (hidden, len(bands), kernel, kernel)).astype(np.float32),
        "w2": rng.normal(0, 0.4, (len(LEGEND), hidden, kernel, kernel)).astype(np.float32),
    }
    pads = [kernel // 2] * 4
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w1"], ["a"], pads=pads),
            helper.make_node("Tanh", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w2"], ["output"], pads=pads),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", len(bands), side, side])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", len(LEGEND), side, side])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "tiny.onnx")
    ones = [1.0] * len(bands)
    return import_onnx(
        folder / "tiny.onnx", folder / "bundle", name="tiny", bands=bands, mean=[0.1 * o for o in ones],
        std=[0.1 * o for o in ones], legend=LEGEND, depth=32,
    )  # fmt: skip
