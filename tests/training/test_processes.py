"""Free of torch, so that the processes start at once."""

import os
import signal
import time

import pytest

from s2seg.errors import InputError, ModelError, OutputError
from s2seg.training.processes import run_processes


def count_up(rank, tell):
    for i in range(3):
        tell((rank, i))
    tell((rank, os.environ["S2SEG_TEST"]))


def wait_for_ever(rank, tell):
    tell(os.getpid())
    time.sleep(600)


def fail_in_one(how, rank, tell):
    """Rank 1 goes wrong; rank 0 waits for it, or notices it in a way that explains nothing."""
    if rank == 0:
        time.sleep(600 if how == "mistake" else 0.2)
        raise RuntimeError("connection closed by peer")
    match how:
        case "mistake" | "noticed":
            raise ModelError("m/", "layer encoder.conv1 is missing")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "bug":
            tell(1 / rank.imag)
    os._exit(3)


class Failing:
    """A picklable ``fail_in_one`` of one kind."""

    def __init__(self, how):
        self.how = how

    def __call__(self, rank, tell):
        fail_in_one(self.how, rank, tell)


def test_messages_come_in_order():
    heard = []
    run_processes(count_up, 2, heard.append, {"S2SEG_TEST": "set"})
    assert [[i for rank, i in heard if rank == wanted] for wanted in (0, 1)] == [[0, 1, 2, "set"]] * 2
    assert "S2SEG_TEST" not in os.environ


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("mistake", ModelError, "^model m/: layer encoder.conv1 is missing$"),
        ("noticed", ModelError, "^model m/: layer encoder.conv1 is missing$"),
        ("killed", InputError, "process 1 was ended by SIGKILL.*--resume"),
        ("bug", RuntimeError, "process 1 failed:\nTraceback(.|\n)*1 / rank.imag"),
    ],
)
def test_the_first_failure_ends_all(monkeypatch, how, error, message):
    monkeypatch.setattr("s2seg.training.processes._GRACE", 1.0)
    with pytest.raises(error, match=message):
        run_processes(Failing(how), 2, print, {})


def test_what_the_listener_raises_ends_all():
    pids = []

    def stop(pid):
        pids.append(pid)
        raise OutputError("out", "full")

    with pytest.raises(OutputError):
        run_processes(wait_for_ever, 2, stop, {})
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
