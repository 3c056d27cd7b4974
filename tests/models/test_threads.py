"""The threads of a network: what each library is told, on a dask worker and off it."""

from collections.abc import Callable
from typing import Any

import dask
import pytest
import torch
from distributed import Client, Scheduler, SpecCluster, Worker

from s2seg.models.runtimes import Choice, onnxrt, opening, openvino
from s2seg.models.runtimes import threads as module
from tests.tiny import tiny_onnx


def on_a_worker(task: Callable[[], Any], nthreads: int) -> Any:
    """Run a task on a worker of this process."""
    here = {"host": "127.0.0.1"}
    workers = {"worker": {"cls": Worker, "options": here | {"nthreads": nthreads}}}
    scheduler = {"cls": Scheduler, "options": here | {"dashboard_address": ":0"}}
    with SpecCluster(workers=workers, scheduler=scheduler) as cluster, Client(cluster) as client:
        return client.submit(task, pure=False).result()


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(module, "CPU_COUNT", 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("wanted", "threads"), [("3", 3), ("3,2", 3), ("16", 16), ("0", None), ("many", None), ("", None)]
)
def test_off_a_worker_a_person_decides(monkeypatch, wanted, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert module.threads_of_process() == threads


def test_no_more_than_the_process_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert module.threads_of_process() == 8


@pytest.mark.parametrize(("nthreads", "threads"), [(5, 5), (12, 8)])
def test_on_a_worker_its_own_number(monkeypatch, nthreads, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as dask's nanny does
    assert on_a_worker(module.threads_of_process, nthreads) == threads


def test_the_setting_goes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with dask.config.set({module.THREADS: 2}):
        assert module.threads_of_process() == 2
        assert on_a_worker(module.threads_of_process, 5) == 2


@pytest.mark.parametrize("nthreads", [None, 5])
def test_every_library_is_told(monkeypatch, tmp_path, nthreads):
    bundle, told = tiny_onnx(tmp_path), []
    monkeypatch.setenv("OMP_NUM_THREADS", "3" if nthreads is None else "1")
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr("s2seg.models.runtimes.pytorch.TorchSession", lambda *_: None)

    def task() -> tuple[int, int]:
        for _ in range(2):
            opening._make(bundle, Choice("torch", "cpu", "float32"))
        options = openvino.OpenVinoSession(bundle, "cpu", "float32")._options
        session = onnxrt.OnnxSession(bundle, "cpu", "float32")._session
        return options["INFERENCE_NUM_THREADS"], session.get_session_options().intra_op_num_threads

    module.set_torch_threads.cache_clear()
    try:
        answers = task() if nthreads is None else on_a_worker(task, nthreads)
    finally:
        module.set_torch_threads.cache_clear()
    assert answers == ((nthreads or 3),) * 2
    assert told == [nthreads or 3]  # once


def test_libraries_count_for_themselves_where_nothing_narrows_them(monkeypatch, tmp_path):
    bundle = tiny_onnx(tmp_path)
    assert "INFERENCE_NUM_THREADS" not in openvino.OpenVinoSession(bundle, "cpu", "float32")._options
    options = onnxrt.OnnxSession(bundle, "cpu", "float32")._session.get_session_options()
    assert options.intra_op_num_threads == 0
