"""The bare network, data in memory: every runtime, precision and window, beside torch in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from s2seg.errors import ModelError
from s2seg.models import available_runtimes, load_model, open_session
from tests.bench.fixtures import converted, fitted_network, piece, scene
from tests.bench.measuring import MEGA, fresh, gib, spread, timed

WAYS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch-compiled", "float32"),
    ("torch-compiled", "bfloat16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("onnxruntime", "float32"),
)
CLASS = frozenset({"class"})


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``runtime``; returns the figures."""
    size = 1024 if quick else 4096
    window, repeats = (512, 2) if quick else (2048, 3)
    bundle, catalog = fitted_network(folder, 20 if quick else 120), scene(folder, size)
    models = {"onnxruntime": converted(bundle, "onnx")} if "onnxruntime" in available_runtimes() else {}
    table = Table("runtime", "window", "Mpx/s", "min-max", "x torch float32", "peak GiB", "agreement %",
                  title=f"the bare network, in memory, uint16 to classes (median of {repeats})")  # fmt: skip
    rows = []
    reference: dict[str, Any] = {}
    for runtime, precision in WAYS:
        model = str(models.get(runtime, bundle.path))
        (seconds, codes, why), peak = fresh(_run, catalog, model, runtime, precision, window, repeats)
        if why:
            table.add_row(f"{runtime} {precision}", str(window), why)
            continue
        speeds = [window**2 * len(codes) / MEGA / s for s in seconds]
        row = {"name": f"{runtime} {precision} {window}", "mpx_s": speeds, "peak_bytes": peak}
        reference = reference or row | {"codes": codes}
        row["agreement"] = float((codes == reference["codes"]).mean())
        row["ratio"] = float(np.median(speeds) / np.median(reference["mpx_s"]))
        table.add_row(
            f"{runtime} {precision}", str(window), *spread(speeds), f"{row['ratio']:.2f}", gib(peak),
            f"{100 * row['agreement']:.3f}",
        )  # fmt: skip
        rows.append(row)
    console.print(table, "goal: agreement of 99.99 % in float32, 99.5 % in bfloat16")
    return {"rows": rows}


def _run(
    catalog: Path, model: str, runtime: str, precision: str, window: int, repeats: int
) -> tuple[list[float], npt.NDArray[np.uint8], str]:
    """Seconds of each repeat, codes (n, y, x) of the windows, and why it did not run, where it did not."""
    pixels = piece(catalog, max(window, 1024 // window * window)).values  # several of the small ones
    windows = [
        np.ascontiguousarray(pixels[None, :, top : top + window, left : left + window])
        for top in range(0, pixels.shape[1] - window + 1, window)
        for left in range(0, pixels.shape[2] - window + 1, window)
    ]
    try:
        session = open_session(load_model(model), runtime, "cpu", precision)
        codes = np.concatenate([session.classify(one, 0, CLASS)["class"] for one in windows])
    except ModelError as error:
        return [], np.empty(0, np.uint8), error.reason

    def once() -> None:
        for one in windows:
            session.classify(one, 0, CLASS)

    return [timed(once) for _ in range(repeats)], codes, ""
