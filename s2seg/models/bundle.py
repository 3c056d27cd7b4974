"""A model on disk: a folder with ``model.json`` and its weights. Loading one runs no code and needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from s2seg.errors import InputError, ModelError, OutputError
from s2seg.models.spec import WEIGHTS_FILES, ModelSpec

if TYPE_CHECKING:
    import torch

SPEC_FILE = "model.json"
CONFIG_FILE = "config.yaml"
"""What a model was trained with, if ``s2seg train`` wrote it: it goes with the model, and is not needed to run it."""
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_REFUSED = (
    "refused: pickled weights can run code when they are loaded. Where you trust the file, load it with torch "
    "(weights_only=True) and export the state dict with s2seg.models.save_bundle (safetensors)"
)

_EXPORTED = (
    "a file for other programs (TorchScript or OpenVINO), which s2seg does not read: use the model that it was made "
    "from, or export that with --kind onnx"
)


@dataclass(frozen=True)
class ModelBundle:
    """A verified model: its spec, and where its weights lie.

    Parameters
    ----------
    path
        Where it came from: an absolute path or a URL; another process can load it from there.
    spec
        What it expects and answers.
    sha256
        Digest of ``model.json`` and the weights together: one number that names the model.
    folder
        The local folder with the files, a cache of ``path`` where that is a URL.
    """

    path: str
    spec: ModelSpec
    sha256: str
    folder: Path

    @property
    def weights_path(self) -> Path:
        """The weights file on this machine."""
        return self.folder / self.spec.weights_file

    @property
    def is_onnx(self) -> bool:
        """Whether the network is an ONNX file, which torch does not run."""
        return self.spec.is_onnx


def load_model(path: str | Path) -> ModelBundle:
    """Open a bundle and check all of it: every field of ``model.json``, and the weights' length and SHA-256.

    Parameters
    ----------
    path
        A local folder, or the URL of one that fsspec can read (``s3://``, ``https://``, ...). A remote bundle is
        downloaded once into ``S2SEG_CACHE`` (default: the user's cache folder), in a folder named by its content.

    Raises
    ------
    ModelError
        For anything that is not a whole, undamaged bundle, and for pickled weights.
    """
    text = str(path)
    if "://" not in text:
        return _load_folder(str(Path(path).expanduser().resolve()), Path(path).expanduser().resolve())
    if text.lower().endswith(_PICKLES):
        raise ModelError(text, _REFUSED)
    return _load_url(text)


def save_bundle(
    path: str | Path,
    spec: ModelSpec,
    weights: Mapping[str, np.ndarray[Any, Any]] | Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> ModelBundle:
    """Write a bundle: ``model.json`` (also a STAC MLM item) and ``weights.safetensors``; all of it or nothing.

    Parameters
    ----------
    path
        A local folder to make.
    spec
        What the network expects and answers.
    weights
        A state dict of numpy arrays or torch tensors, by parameter name.
    overwrite
        Replace a bundle that is there already; anything else there is never removed.

    Raises
    ------
    OutputError
        When the folder exists or cannot be written.
    """
    if spec.is_onnx:
        raise InputError("an ONNX network has no state dict: use s2seg.models.import_onnx")
    arrays = {name: _to_numpy(value) for name, value in weights.items()}
    return write_bundle(path, spec, lambda file: safetensors.numpy.save_file(arrays, file), overwrite=overwrite)


def write_bundle(
    path: str | Path, spec: ModelSpec, write_weights: Callable[[Path], object], *, overwrite: bool
) -> ModelBundle:
    """Write ``spec`` and whatever ``write_weights`` puts into the file it is given; all of it or nothing."""
    if "://" in str(path):
        raise OutputError(str(path), "a model is written to a local folder; copy it from there")
    target = Path(path).expanduser().resolve()
    try:
        with _new_folder(target, overwrite) as folder:
            write_weights(folder / spec.weights_file)
            item = spec.to_item(_file_digest(folder / spec.weights_file))
            (folder / SPEC_FILE).write_text(json.dumps(item, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(str(path), " ".join(str(error).split())) from error
    return load_model(target)


def describe(bundle: ModelBundle) -> list[tuple[str, str]]:
    """Rows of (what, value) that tell a person what a model is, for ``s2seg models show``."""
    spec = bundle.spec
    window = f"{spec.window} px, fixed" if spec.window else "any multiple of the stride"
    context = "the whole window (blended)" if spec.global_context else "local (trimmed)"
    rows = [
        ("name", spec.name),
        ("path", bundle.path),
        ("sha256", bundle.sha256),
        ("architecture", _inline(spec.architecture)),
        ("runtimes", f"openvino, {'onnxruntime' if bundle.is_onnx else 'torch'}"),
        ("weights", f"{spec.weights_file}, {bundle.weights_path.stat().st_size / 2**20:.1f} MiB"),
        *(
            (f"band {band}", f"(DN x {spec.scale:g} - {mean:.4g}) / {std:.4g}")
            for band, mean, std in zip(spec.bands, spec.mean, spec.std, strict=True)
        ),
        ("legend", f"{spec.legend.name}, nodata {spec.legend.nodata}"),
        *((f"class {c.code}", f"{c.name} {c.color}") for c in spec.legend.classes),
        ("returns", spec.activation),
        ("window", window),
        ("context", context),
        ("stride, depth", f"{spec.stride}, {spec.depth} px"),
    ]
    rows += [(f"provenance {key}", _inline(value)) for key, value in spec.provenance.items()]
    return rows + [(f"metric {key}", _inline(value)) for key, value in spec.metrics.items()]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_inline(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_inline, value)) if isinstance(value, list) else str(value)


def _load_folder(path: str, folder: Path) -> ModelBundle:
    if not folder.is_dir():
        _refuse_file(path, folder)
    if not (folder / SPEC_FILE).is_file():
        files = sorted(folder.iterdir())
        if any(map(_is_export, files)):
            raise ModelError(path, _EXPORTED)
        if any(file.suffix.lower() in _PICKLES for file in files):
            raise ModelError(path, _REFUSED)
        raise ModelError(path, f"not a model bundle: no {SPEC_FILE} in the folder")
    try:
        content = (folder / SPEC_FILE).read_bytes()
        spec, recorded = _parse(path, content)
        _check_weights(path, folder / spec.weights_file, recorded)
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    return ModelBundle(path, spec, _bundle_digest(content, recorded), folder)


def _refuse_file(path: str, file: Path) -> None:
    """Say why ``file``, which is no folder, is not a bundle."""
    if not file.exists():
        raise ModelError(path, "there is no such folder")
    if _is_export(file):
        raise ModelError(path, _EXPORTED)
    refuse_pickle(path, file)
    if file.suffix.lower() == ".onnx":
        raise ModelError(path, "a bare ONNX network: wrap it first with `s2seg models import`")
    raise ModelError(path, f"not a model bundle: a folder with {SPEC_FILE} and weights is needed, not a file")


def _is_export(file: Path) -> bool:
    """Whether a file is OpenVINO's or TorchScript's: by names alone, of files and of what is in the archive."""
    if file.suffix in (".xml", ".bin"):
        return file.with_suffix(".xml").is_file() and file.with_suffix(".bin").is_file()
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):  # a folder, no archive, or a damaged one
        return False


def refuse_pickle(path: str, file: Path) -> None:
    """Raise ModelError about ``path`` if ``file`` is a pickle by its name or its first bytes."""
    with file.open("rb") as opened:
        head = opened.read(16)
    if file.name.lower().endswith(_PICKLES) or _looks_pickled(head):
        raise ModelError(path, _REFUSED)


def _looks_pickled(head: bytes) -> bool:
    # torch.save writes a zip archive; before that, and elsewhere, a pickle opens with its protocol: 0x80 0x02 to 0x05.
    # The same bytes can be a safetensors header's length, but then the header itself follows at byte 8.
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] not in (b"", b"{"))


def _parse(path: str, content: bytes) -> tuple[ModelSpec, str]:
    try:
        return ModelSpec.from_item(json.loads(content))
    except InputError as error:
        raise ModelError(path, f"{SPEC_FILE}: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of 5000 digits
        raise ModelError(path, f"{SPEC_FILE} is not JSON: {error}") from error


def _check_weights(path: str, file: Path, recorded: str) -> None:
    if not file.is_file():
        raise ModelError(path, f"{file.name} is missing")
    refuse_pickle(path, file)
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, framework="numpy"):
                pass  # opening reads the header and compares it with the file's length
        except safetensors.SafetensorError as error:
            raise ModelError(path, f"{file.name} is truncated or damaged ({error}): copy it again") from error
    if _file_digest(file) != recorded:
        raise ModelError(path, f"{file.name} is damaged or another model's: its SHA-256 is not the recorded one")


def _bundle_digest(spec_content: bytes, weights_sha256: str) -> str:
    # the weights come in by their digest, which has just been checked: no second pass over a large file
    return hashlib.sha256(spec_content + bytes.fromhex(weights_sha256)).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Return a dense array of ``value``; the writer copies memory as it lies, so strides must not survive."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value, order="C")


@contextlib.contextmanager
def _new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a fresh folder that takes ``target``'s place when the block ends well, and vanishes when it does not."""
    check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(Path(scratch) / "old")
        folder.rename(target)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to write a bundle where something else stands, or a bundle that is not to be overwritten.

    Raises
    ------
    OutputError
        Saying what stands there.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(str(target), "a file of this name exists")
    if not any(target.iterdir()):
        return
    if not (target / SPEC_FILE).is_file():
        raise OutputError(str(target), f"the folder holds other things (no {SPEC_FILE}): choose another")
    ours = {SPEC_FILE, CONFIG_FILE, *WEIGHTS_FILES.values()}
    if more := sorted(path.name for path in target.iterdir() if path.name not in ours):
        raise OutputError(
            str(target), f"the folder holds more than a model, which is never removed ({more[0]}): choose another"
        )
    if not overwrite:
        raise OutputError(str(target), "a model is there already: choose another folder, or overwrite it (--overwrite)")


def _load_url(url: str) -> ModelBundle:
    import fsspec  # only here: a local model does not need it
    from fsspec.implementations.local import LocalFileSystem

    root = url.rstrip("/")
    try:
        fs, inner = fsspec.core.url_to_fs(root)
        if isinstance(fs, LocalFileSystem):
            return _load_folder(url, Path(inner))
        content = fs.cat_file(f"{inner}/{SPEC_FILE}")
        spec, _ = _parse(url, content)
        folder = cache_folder("models") / hashlib.sha256(content).hexdigest()[:32]
        with contextlib.suppress(ModelError):  # not there yet, or damaged since: fetch it
            return _load_folder(url, folder)
        return _download(url, folder, content, lambda file: fs.get_file(f"{inner}/{spec.weights_file}", str(file)))
    except FileNotFoundError as error:
        raise ModelError(url, f"not a model bundle: {SPEC_FILE} or the weights are not there ({error})") from error
    except _remote_errors() as error:
        raise ModelError(url, f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def _download(url: str, folder: Path, content: bytes, fetch: Callable[[Path], object]) -> ModelBundle:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / SPEC_FILE).write_bytes(content)
        spec, _ = _parse(url, content)
        fetch(new / spec.weights_file)
        _load_folder(url, new)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster with the same content
            new.rename(folder)
    return _load_folder(url, folder)


def _remote_errors() -> tuple[type[Exception], ...]:
    """Return what reading a URL can raise: not all clients use OSError, and one never imported raised nothing."""
    known = {"aiohttp": "ClientError", "botocore.exceptions": "BotoCoreError"}
    own = [getattr(sys.modules[module], name) for module, name in known.items() if module in sys.modules]
    return (OSError, ImportError, ValueError, *own)


def cache_folder(what: str) -> Path:
    """Return where fetched models and converted networks are kept: ``S2SEG_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("S2SEG_CACHE"):
        base = Path(chosen)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "s2seg"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches/s2seg"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2seg"
    return base.expanduser() / what
