"""The output folder of a run: what is there, what is under way, and when it appears."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from s2seg.errors import OutputError
from s2seg.outputs._files import check_writable, may_go_on, partial_of, remove, writing

RUN = "run.json"
ZARR = "land_cover.zarr"
QUICKLOOK = "quicklook.png"

_DATE = r"(_\d{8}(T\d{6})?)?"  # of each map in ``per-date`` mode
_OUTPUTS = re.compile(
    rf"{re.escape(RUN)}|{re.escape(ZARR)}|{re.escape(QUICKLOOK)}|item{_DATE}\.json"
    rf"|land_cover{_DATE}\.(tif|tif\.aux\.xml|qml)"
)
_STAGED = ".s2seg-partial"
_LOCK = "lock"


def finished_run(folder: Path, *, overwrite: bool) -> dict[str, Any]:
    """Check, before anything is read, that a run may write here.

    Parameters
    ----------
    folder
        Where it is to write.
    overwrite
        Whether it replaces what is there.

    Returns
    -------
    dict
        What ``run.json`` says if the outputs of a run are all there and not to be replaced: they may be up to date.
        Else nothing.

    Raises
    ------
    OutputError
        If the folder cannot be written to, or some outputs stand in the way.
    """
    check_writable(folder / RUN, overwrite=True)
    check_writable(folder / ZARR, overwrite=True, store=True)
    there = _outputs(folder)
    if overwrite or not there:
        return {}
    record = _record(folder)
    if not record:
        raise OutputError(str(there[0]), "it exists already; pass --overwrite to replace it")
    return record


def check_up_to_date(folder: Path, record: Mapping[str, Any], made_of: str) -> None:
    """Raise an OutputError if a finished run made another map."""
    if record.get("fingerprint") != made_of:
        raise OutputError(
            str(folder / RUN),
            "it exists already, of other scenes, another model or other settings; pass --overwrite to replace it",
        )


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Give a folder inside the output that is removed again, with the output folder if that is new and still empty.

    The blocks of an interrupted run stay in it. One run at a time has it.

    Raises
    ------
    OutputError
        If another run has it.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    staged = folder / _STAGED
    with writing(folder):
        staged.mkdir(parents=True, exist_ok=True)
    with _alone(staged, folder):
        begun = staged / ZARR, partial_of(staged / ZARR)
        with writing(folder):
            for left in staged.iterdir():
                if left not in begun and left.name != _LOCK:
                    remove(left)
        kept = False
        try:
            yield staged
        except BaseException as error:
            kept = may_go_on(error) and any(path.exists() for path in begun)
            if kept:
                error.add_note(f"what is done is kept in {staged}: the same command goes on from there")
            raise
        finally:
            if not kept:
                shutil.rmtree(staged, ignore_errors=True)
                for made in created:
                    if made.exists() and not any(made.iterdir()):
                        made.rmdir()


def publish(staged: Path, folder: Path) -> None:
    """Move finished outputs to their names; run.json goes last, so that it vouches for the rest."""
    for earlier in _outputs(folder):
        remove(earlier)
    for path in sorted(staged.iterdir(), key=lambda p: p.name == RUN):
        if path.name != _LOCK:
            path.replace(folder / path.name)


def _outputs(folder: Path) -> list[Path]:
    """What runs have written, and nothing else."""
    return sorted(path for path in folder.glob("*") if _OUTPUTS.fullmatch(path.name))


def _record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says, if all that it names is there."""
    try:
        record: dict[str, Any] = json.loads((folder / RUN).read_text())
        names = [made[kind] for made in record["maps"] for kind in ("land_cover", "item")]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return {}
    return record if all((folder / name).exists() for name in (*names, ZARR, QUICKLOOK)) else {}


@contextmanager
def _alone(staged: Path, folder: Path) -> Iterator[None]:
    """Hold a lock that a process loses when it ends, however it does."""
    try:
        with FileLock(staged / _LOCK, timeout=0):
            yield
    except Timeout:
        raise OutputError(str(folder), "another run is writing there; wait for it, or choose another path") from None
