"""Run a model: one Protocol, with torch, OpenVINO and onnxruntime behind it; one session per process and model."""

from s2seg.models.runtimes.answers import LAYERS, summarize
from s2seg.models.runtimes.choosing import COMPILED, Choice, available_runtimes, expected_session
from s2seg.models.runtimes.opening import SessionRef, choose_session, open_session
from s2seg.models.runtimes.session import Session

__all__ = [
    "COMPILED",
    "LAYERS",
    "Choice",
    "Session",
    "SessionRef",
    "available_runtimes",
    "choose_session",
    "expected_session",
    "open_session",
    "summarize",
]
