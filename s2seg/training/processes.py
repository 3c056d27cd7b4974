"""The same work in several processes at once: what they tell reaches the caller, and the first failure ends them all.

Lightning could start them, but tells nothing of how far they are, leaves those that wait for a dead one, and ends in a
report of many lines where a user's mistake deserves one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from s2seg.errors import InputError, S2SegError

Tell = Callable[[Any], None]
Work = Callable[[int, Tell], None]

_GRACE = 5.0
"""Seconds in which the others may say what went wrong: who stumbles over a dead process is often heard first."""


@dataclass(frozen=True)
class _Failure:
    """How a process ended: with a mistake to be told in one line, with a bug, or without a word."""

    rank: int
    error: S2SegError | None
    trace: str = ""
    exitcode: int = 1

    def cause(self) -> Exception:
        if self.error is not None:
            return self.error
        if self.trace:
            return RuntimeError(f"process {self.rank} failed:\n{self.trace}")
        if self.exitcode < 0:
            name = signal.Signals(-self.exitcode).name
            hint = "if memory ran out, lower fit.devices and pass --resume, or lower fit.batch_size"
            return InputError(f"training process {self.rank} was ended by {name}; {hint}")
        hint = 'in a script of your own, call it below `if __name__ == "__main__":`'
        return InputError(f"training process {self.rank} ended with exit code {self.exitcode} at once; {hint}")


def run_processes(work: Work, count: int, on_message: Tell, environment: Mapping[str, str]) -> None:
    """Run ``work(rank, tell)`` in new processes, and wait for all of them.

    Parameters
    ----------
    work
        Called in every process with its rank, from 0, and with a function that sends a message to the caller. It is
        pickled, and the processes start from nothing: no thread, lock or device of the caller is shared.
    count
        Processes.
    on_message
        Called here with everything that is told, in the order in which each process told it. What it raises ends the
        processes.
    environment
        Variables that the processes find set, beside those of the caller.

    Raises
    ------
    S2SegError
        As it was raised in one of the processes; or when one was ended from outside. The others are ended first.
    RuntimeError
        With the traceback of anything else that was raised in one of them.
    """
    context = multiprocessing.get_context("spawn")
    ways: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_run, args=(work, rank, sender), daemon=True, name=f"s2seg-{rank}"
            )
            ways[receiver] = rank, process
            with _environment(environment):
                process.start()
            sender.close()  # so that its end is the end of the messages
        failures = _listen(dict(ways), on_message)
    finally:
        for _, process in ways.values():
            _end(process)
    if failures:
        raise min(failures, key=_telling).cause()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _telling(failure: _Failure) -> int:
    """A named mistake tells most; a process that was killed explains why others failed."""
    return 0 if failure.error is not None else 1 if failure.exitcode < 0 else 2


def _listen(open_ways: dict[Connection, tuple[int, BaseProcess]], on_message: Tell) -> list[_Failure]:
    """Pass messages on until all processes have ended or one has named a mistake, or a moment after a failure."""
    failures: list[_Failure] = []
    until: float | None = None
    while open_ways and (until is None or time.monotonic() < until):
        for way in wait(list(open_ways), None if until is None else max(0.0, until - time.monotonic())):
            assert isinstance(way, Connection)  # of what wait() takes, only these were given
            rank, process = open_ways[way]
            try:
                message = way.recv()
            except EOFError:
                del open_ways[way]
                process.join()
                if process.exitcode and rank not in (failure.rank for failure in failures):
                    failures.append(_Failure(rank, None, exitcode=process.exitcode))
            else:
                if isinstance(message, _Failure):
                    failures.append(message)
                    if message.error is not None:
                        return failures
                elif not failures:
                    on_message(message)
        if failures and until is None:
            until = time.monotonic() + _GRACE
    return failures


def _end(process: BaseProcess) -> None:
    if process.pid is not None:
        process.kill()  # one that waits for another hears nothing softer
        process.join()


def _run(work: Work, rank: int, sender: Connection) -> None:
    """Do one process's share; its last message is how it failed, if it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller hears an interrupt, too, and ends all of them
    threading.Thread(target=_end_with_caller, daemon=True).start()
    # the caller's choice of warnings is not known here, and each would come from every process
    warnings.simplefilter("ignore")
    try:
        work(rank, sender.send)
    except S2SegError as error:
        sender.send(_Failure(rank, error))
        raise SystemExit(1) from error
    except Exception:  # noqa: BLE001  nothing is swallowed: it is raised again where the processes were started
        sender.send(_Failure(rank, None, traceback.format_exc()))
        raise SystemExit(1) from None


def _end_with_caller() -> None:
    """Leave nothing behind when the caller is killed."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)
