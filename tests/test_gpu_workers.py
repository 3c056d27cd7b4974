"""Who runs the network, and on how much at once: workers that have a GPU, as many threads as the session wants."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import dask
import numpy as np
import pytest
from distributed import Client, Scheduler, SpecCluster, Worker, get_worker

from s2seg import inference
from s2seg.inference import predict
from s2seg.models.runtimes import SessionRef, expected_session, onnxrt, open_session
from s2seg.outputs.zarr import read_land_cover, write_zarr
from s2seg.pipeline import run
from s2seg.pipeline.plan import plan_area
from s2seg.testing import SyntheticRegion
from s2seg.windows import ChunkSpec
from tests.test_inference import make_scene
from tests.tiny import tiny_onnx

ran: dict[str, Counter[str]] = {}


def read(block: np.ndarray) -> np.ndarray:
    ran["read"][get_worker().name] += 1
    return block


def _cluster(**resources: dict[str, int]) -> SpecCluster:
    """Workers in this process, by name, with what they announce."""
    here = {"host": "127.0.0.1"}
    return SpecCluster(
        workers={
            name: {"cls": Worker, "options": here | {"nthreads": 2, "resources": announced}}
            for name, announced in resources.items()
        },
        scheduler={"cls": Scheduler, "options": here | {"dashboard_address": ":0"}},
    )


@pytest.mark.parametrize(
    ("device", "networks_run_on"), [("auto", {"gpu"}), ("cpu", {"gpu", "io"})], ids=["bound to the GPU", "anywhere"]
)
def test_only_workers_with_a_gpu_run_the_network(
    tmp_path, monkeypatch: pytest.MonkeyPatch, device: str, networks_run_on: set[str]
) -> None:
    model, scene, spec = tiny_onnx(tmp_path / "m"), make_scene(512, 512), ChunkSpec.trimmed(core=64, depth=32)
    expected = predict(scene, model, chunks=spec, runtime="onnxruntime").compute()
    ran.update(read=Counter(), network=Counter())
    classify = onnxrt.OnnxSession.classify

    def noted(self: onnxrt.OnnxSession, *arguments: object) -> object:
        ran["network"][get_worker().name] += 1
        return classify(self, *arguments)

    monkeypatch.setattr(onnxrt.OnnxSession, "classify", noted)
    with _cluster(io={}, gpu={"GPU": 1}) as cluster, Client(cluster):
        scene = scene.copy(data=scene.data.map_blocks(read, dtype=scene.dtype, meta=np.empty((0, 0, 0), scene.dtype)))
        lazy = predict(scene, model, chunks=spec, runtime="onnxruntime", device=device)
        write_zarr(lazy, tmp_path / "map.zarr")
    np.testing.assert_array_equal(read_land_cover(tmp_path / "map.zarr").land_cover, expected.land_cover)
    assert set(ran["network"]) == networks_run_on
    assert set(ran["read"]) == {"gpu", "io"}


def test_a_map_on_a_cluster_opens_the_network_on_a_worker(
    synthetic: SyntheticRegion, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_by = []
    choose = run.choose_session
    monkeypatch.setattr(run, "choose_session", lambda *choice: opened_by.append(get_worker().name) or choose(*choice))
    model = tiny_onnx(tmp_path / "m")
    with _cluster(worker={}) as cluster, Client(cluster):
        record = run.map_area(synthetic.catalog, synthetic.bbox, "2021", model, tmp_path / "out").record
    assert opened_by == ["worker"]
    assert record["model"]["session"] == " ".join(expected_session(model))


def test_all_tasks_ask_for_what_one_worker_settled_on(
    synthetic: SyntheticRegion, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny_onnx(tmp_path / "m"), set()
    area = synthetic.catalog, synthetic.bbox, "2021", model
    assert expected_session(model)[0] == "openvino", "what this process would take"
    choose, open_ref = run.choose_session, SessionRef.open

    def noted(ref: SessionRef) -> object:
        asked.add((ref.runtime, ref.device, ref.precision))
        return open_ref(ref)

    with monkeypatch.context() as worker:
        worker.setattr(run, "choose_session", lambda bundle, *_: choose(bundle, "onnxruntime"))
        worker.setattr(SessionRef, "open", noted)
        with _cluster(worker={}) as cluster, Client(cluster):
            record = run.map_area(*area, tmp_path / "out").record
            assert run.map_area(*area, tmp_path / "out").up_to_date
    assert asked == {("onnxruntime", "cpu", "float32")}
    assert record["model"]["session"] == "onnxruntime cpu float32"
    assert record["options"]["runtime"] == "auto"
    alone = run.map_area(*area, tmp_path / "alone").record
    assert alone["fingerprint"] != record["fingerprint"], "neither goes on where the other was interrupted"


@pytest.mark.parametrize(
    ("device", "name", "asks"),
    [("auto", "torch cuda bfloat16", "cuda"), ("cuda:1", "torch cuda:1 bfloat16", "cuda:1")],
)
def test_gpus_of_any_number_make_the_same_map(
    synthetic: SyntheticRegion, tmp_path, device: str, name: str, asks: str
) -> None:
    plan = plan_area(synthetic.catalog, synthetic.bbox, "2021", tiny_onnx(tmp_path / "m"))
    settled = run._settled(replace(plan, options=replace(plan.options, device=device)), name).options
    assert (settled.runtime, settled.device, settled.precision) == ("torch", asks, "bfloat16")
    assert run._kind(name) == ("torch", "cuda", "bfloat16")


class Cluster:
    """A client of many workers, the last of which has a GPU; tells of five where it is not asked for all."""

    def scheduler_info(self, n_workers: int = 5) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        workers = {f"io-{i}": {"resources": {}} for i in range(7)} | {"gpu": {"resources": {"GPU": 1}}}
        return {"workers": dict(list(workers.items())[: len(workers) if n_workers == -1 else n_workers])}


def test_a_gpu_is_found_behind_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "current_client", Cluster)
    with inference.gpu_annotations(SessionRef("model", "0" * 64)):
        assert dask.get_annotations() == {"resources": {"GPU": 1}}


@pytest.mark.parametrize("parallel", [1, 2])
def test_as_many_threads_run_the_network_as_the_session_wants(
    tmp_path, monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    model, scene = tiny_onnx(tmp_path / "m"), make_scene(256, 256)
    session, together = open_session(model, "onnxruntime"), threading.Barrier(parallel)
    classify, running, most = session.classify, set(), []

    def noted(*arguments: object) -> object:
        running.add(threading.get_ident())
        together.wait(timeout=20)  # passes only where so many are here
        most.append(len(running))
        together.wait(timeout=20)
        running.discard(threading.get_ident())
        return classify(*arguments)

    monkeypatch.setattr(session, "parallel", parallel)
    monkeypatch.setattr(session, "classify", noted)
    with dask.config.set(scheduler="threads", num_workers=4):
        predict(scene, model, chunks=ChunkSpec.trimmed(core=64, depth=32), runtime="onnxruntime").compute()
    assert most == [parallel] * 16


def test_windows_go_in_batches_of_the_sessions_choice(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scene, asked, sizes = tiny_onnx(tmp_path / "m"), make_scene(256, 256), [], []
    spec = ChunkSpec.blended(core=96, window=64, overlap=32)
    expected = predict(scene, model, chunks=spec).compute()
    session = open_session(model)
    probabilities = session.probabilities
    monkeypatch.setattr(session, "batch", lambda *size: asked.append(size) or 2)
    monkeypatch.setattr(session, "probabilities", lambda windows: sizes.append(len(windows)) or probabilities(windows))
    np.testing.assert_array_equal(predict(scene, model, chunks=spec).land_cover, expected.land_cover)
    assert set(asked) == {(64, 64)}
    assert max(sizes) == 2
