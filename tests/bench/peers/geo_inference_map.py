"""A map by NRCan's geo-inference: patches that overlap by half, one at a time, averaged with a Hann window."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from geo_inference.geo_inference import GeoInference
from task import Network, run


def way(task: dict, network: Network) -> str:
    folder = Path(task["folder"])
    inference = GeoInference(
        model=task["network"], work_dir=str(folder), device="cpu", num_classes=task["classes"], prediction_threshold=0.0
    )
    inference.model = network  # the same weights, but they take uint16
    return str(folder / inference(task["image"], patch_size=task["patch"]))


if __name__ == "__main__":
    run(way, version("geo-inference"))
