"""What every writer shares: refusals up front, files that appear only when complete, class names as identifiers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s2seg.errors import OutputError, ReadError, S2SegError
from s2seg.legend import Legend


def is_url(path: str | Path) -> bool:
    """Whether a path is for fsspec (``s3://bucket/map.zarr``) rather than for the local file system."""
    return "://" in str(path)


def check_writable(path: str | Path, *, overwrite: bool = False, store: bool = False) -> Path:
    """Refuse early what a long computation would otherwise run into at its end.

    Parameters
    ----------
    path
        A local file or folder that is about to be written. Missing parents are fine: a writer makes them.
    overwrite
        Whether something may already stand there: a file, or an earlier Zarr store for one, never another folder.
    store
        Whether it is to be a Zarr store.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    OutputError
        If it exists and may not be replaced, or if its nearest existing parent cannot be written to.
    """
    path = Path(path)
    if not overwrite and (path.exists() or path.is_symlink()):
        raise OutputError(str(path), "it exists already; pass --overwrite (overwrite=True) or choose another path")
    if path.is_dir() and not (store and _is_store(path)):
        raise OutputError(str(path), "a folder of other things is there, which is never replaced; choose another path")
    parent = existing_parent(path)
    if not parent.is_dir():
        raise OutputError(str(path), f"{parent} is a file, not a folder; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(str(path), f"no permission to write in {parent}; choose another path")
    return path


def _is_store(folder: Path) -> bool:
    return (folder / "zarr.json").is_file() or not any(folder.iterdir())


def existing_parent(path: Path) -> Path:
    """Nearest of a path's parents that is there."""
    return next(p for p in path.absolute().parents if p.exists())


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says about a write (disk full, no permission) into an OutputError.

    Keep the block tight: an OSError from reading the input does not belong in it.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "free some space or choose another path" if full else "choose another path"
        raise OutputError(str(path), f"{reason}; {way_out}") from error


def partial_of(path: Path) -> Path:
    """Where :func:`replacing` has a file or folder written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path, begun: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of ``path`` when the block ends well, and vanishes otherwise.

    Parameters
    ----------
    path
        What is to be written.
    begun
        Whether what the sibling holds is worth going on from: asked at the start of what an earlier run has left, and
        again if the block is interrupted (:func:`may_go_on`). If so, the sibling stays.
    """
    partial = partial_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not begun():
            remove(partial)
    try:
        yield partial
        with writing(path):
            _swap(partial, path)
    except BaseException as error:  # also an interrupt: nothing half-written may stay
        if not (may_go_on(error) and begun()):
            _clear_away(partial)
        raise


def may_go_on(error: BaseException) -> bool:
    """Whether the next run may get further from here: after an interrupt, a lost worker, a server that failed.

    Not where the input or the disk must change first.
    """
    return not isinstance(error, S2SegError) or (isinstance(error, ReadError) and is_url(error.href))


def _clear_away(partial: Path) -> None:
    """Delete what was half-written, again and again for a second: other threads may be at their last block still."""
    for _ in range(20):
        remove(partial, ignore_errors=True)
        time.sleep(0.05)
        if not partial.exists():
            return


def _swap(partial: Path, path: Path) -> None:
    if partial.is_file() and not path.is_dir():
        partial.replace(path)
        return
    if path.is_dir() and not path.is_symlink() and not (partial.is_dir() and _is_store(path)):
        raise IsADirectoryError(errno.EISDIR, "a folder of other things is there, which is never replaced")
    old = path.with_name(f".{path.name}.old")  # a folder cannot be replaced in one step
    remove(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    remove(old)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file or a folder, whichever stands there, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def identifiers(legend: Legend) -> tuple[str, ...]:
    """Class names as one word each, as CF's ``flag_meanings`` and STAC's ``classification:classes`` want them.

    Letters, digits, ``-`` and ``_`` stay, everything else becomes ``_``; names that collide get their code appended.
    """
    words = [re.sub(r"[^0-9A-Za-z-]+", "_", name).strip("_") or "class" for name in legend.names]
    return tuple(
        f"{word}_{code}" if words.count(word) > 1 else word for word, code in zip(words, legend.codes, strict=True)
    )
