"""Models: bundles on disk, networks by name, and the runtimes that run them. Importing this loads no runtime."""

from s2seg.models.bundle import ModelBundle, describe, load_model, save_bundle
from s2seg.models.importing import import_csmask, import_onnx
from s2seg.models.runtimes import Session, SessionRef, available_runtimes, open_session, summarize
from s2seg.models.spec import ModelSpec
from s2seg.models.unet import build_network, pools_globally

__all__ = [
    "ModelBundle",
    "ModelSpec",
    "Session",
    "SessionRef",
    "available_runtimes",
    "build_network",
    "describe",
    "import_csmask",
    "import_onnx",
    "load_model",
    "open_session",
    "pools_globally",
    "save_bundle",
    "summarize",
]
