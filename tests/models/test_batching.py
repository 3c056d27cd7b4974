"""Batches: how many windows go at once, their way to a device and back, and what happens where memory is short."""

import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from s2seg.errors import ModelError
from s2seg.inference import chunks_for
from s2seg.models import import_onnx, open_session, save_bundle
from s2seg.models.runtimes import LAYERS
from s2seg.models.runtimes.batching import MeasuredBatches, fastest_batch
from s2seg.models.runtimes.lanes import CudaLane, HostLane, Lanes
from s2seg.models.runtimes.pytorch import TorchSession, lacks_memory
from s2seg.models.runtimes.tuning import largest_image
from tests.models.conftest import smooth_pixels
from tests.models.test_runtimes import assert_layers_agree

ALL = frozenset(LAYERS)
CLASS = frozenset(["class"])


@pytest.fixture
def session(bundle):
    """A session of its own for each test: these change what it has."""
    return TorchSession(bundle, "cpu", "float32")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("S2SEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batches"


# -- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected", "tried"),
    [
        ([1, 1, 1, 1, 1], 16, 5),  # a device that one window leaves idle
        ([1, 2, 4, 8, 16], 1, 2),  # one that one window fills
        ([1, 1.5, 2.9, 8, 16], 2, 3),  # 4 windows are 3 % faster than 2: not worth the memory
        ([1, 1.2, None, 1, 1], 2, 3),  # no memory for 4
        ([None], 1, 1),  # not even for one: the call itself says so
    ],
)
def test_more_windows_as_long_as_it_pays(seconds, expected, tried):
    seen = []

    def measure(count, height, width):
        seen.append((count, height, width))
        return seconds[len(seen) - 1]

    assert fastest_batch(measure, 64, 96) == expected
    assert seen == [(2**i, 64, 96) for i in range(tried)]


def test_a_processor_takes_what_its_caches_hold(session, onnx_free, onnx_fixed, facts, tmp_path):
    foreign = open_session(import_onnx(onnx_free, tmp_path / "free", **facts), "onnxruntime")
    for one in (session, foreign):
        assert one.parallel == 1
        assert [one.batch(side, side) for side in (64, 128, 512, 2048)] == [64, 16, 1, 1]
    assert open_session(import_onnx(onnx_fixed, tmp_path / "fixed", **facts), "onnxruntime").batch(64, 64) == 1


class Card:
    """Counts what is measured."""

    def __init__(self, *seconds):
        self.seconds, self.trials = seconds, 0

    def __call__(self, count, height, width):
        self.trials += 1
        return self.seconds[count.bit_length() - 1]


def test_a_measured_batch_is_kept_for_this_process_and_the_next(cache):
    card, slower = Card(1, 1.2, 2.4), Card(1, 2)
    batches = MeasuredBatches("ab" * 32, "a card, bfloat16", card)
    assert [batches(64, 64), batches(64, 64), batches(64, 96)] == [2, 2, 2]
    assert card.trials == 6, "once per window shape"
    assert MeasuredBatches("ab" * 32, "a card, bfloat16", slower)(64, 64) == 2
    assert slower.trials == 0, "what another process found"
    assert MeasuredBatches("ab" * 32, "a card, float32", slower)(64, 64) == 1
    assert MeasuredBatches("cd" * 32, "a card, bfloat16", slower)(64, 64) == 1
    (kept, _) = sorted(cache.iterdir())
    assert json.loads(kept.read_text()) == {
        "a card, bfloat16": {"64x64": 2, "64x96": 2}, "a card, float32": {"64x64": 1},
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "[1]", '{"card": 3}', '{"card": {"64x64": 5}}', '{"card": {"64x64": "2"}}'])
def test_a_damaged_note_is_measured_again(cache, content):
    cache.mkdir(parents=True)
    file = cache / f"{'ab' * 16}.json"
    file.write_text(content)
    assert MeasuredBatches("ab" * 32, "card", Card(1, 1, 2))(64, 64) == 2
    assert json.loads(file.read_text()) == {"card": {"64x64": 2}}


def test_a_folder_that_cannot_be_written_stops_nothing(cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert MeasuredBatches("ab" * 32, "card", Card(1, 2))(64, 64) == 1


def test_threads_wait_for_one_measurement(cache):
    card, start, found = Card(1, 1, 2), threading.Barrier(4), []
    batches = MeasuredBatches("ab" * 32, "card", card)

    def ask():
        start.wait()
        found.append(batches(64, 64))

    in_threads([ask] * 4)
    assert (found, card.trials) == ([2] * 4, 3)


def test_a_session_measures_itself(session, cache, monkeypatch):
    session._batches = MeasuredBatches("ab" * 32, "card", session._seconds)
    seen = starve(session, 4 * 64 * 64, monkeypatch)
    assert session.batch(64, 64) in (1, 2, 4)
    assert seen[:4] == [1] * 4, "a first run, which is not counted, and three"
    assert session._seconds(4, 64, 64) > 0
    assert session._seconds(8, 64, 64) is None


def test_a_trial_runs_in_all_lanes_at_once(session, monkeypatch):
    session._lanes, together = Lanes([HostLane(), HostLane()]), threading.Barrier(2)
    network, room, rows = session._network, 4, []

    def run(x):
        rows.append(len(x))
        together.wait(timeout=20)  # passes only in pairs
        if 2 * len(x) > room:
            raise NO_MEMORY
        return network(x)

    monkeypatch.setattr(session, "_network", run)
    assert fastest_batch(session._seconds, 64, 64) in (1, 2)
    assert session._seconds(2, 64, 64) > 0
    assert session._seconds(4, 64, 64) is None, "it would fit alone, but a map runs two"
    assert len(rows) % 2 == 0


@pytest.mark.parametrize(
    ("changes", "side", "runs"),
    [
        ({}, 256, "_trimmed"),
        ({}, 192, "_network"),  # nothing of it would be left
        ({"global_context": True}, 256, "probabilities"),
    ],
)
def test_a_trial_runs_what_a_map_runs(other_spec, network, tmp_path, monkeypatch, changes, side, runs):
    bundle, ran = save_bundle(tmp_path, other_spec(**changes), network.state_dict()), []
    session = TorchSession(bundle, "cpu", "float32")
    for name, cut in (("_network", 0), ("_trimmed", 88)):

        def run(x, name=name, cut=cut):
            ran.append(name)
            return torch.zeros(len(x), 3, *(n - 2 * cut for n in x.shape[2:]))

        monkeypatch.setattr(session, name, run)
    probabilities = session._probabilities
    monkeypatch.setattr(session, "_probabilities", lambda dn: ran.append("probabilities") or probabilities(dn))
    assert session._seconds(1, side, side) > 0
    assert runs in ran
    assert ("probabilities" in ran) == bool(changes)


@pytest.mark.parametrize(("precision", "share", "steps"), [("float32", 1e-4, 1), ("bfloat16", 1e-3, 5)])
def test_the_map_depends_on_the_batch_no_more_than_rounding_does(bundle, precision, share, steps):
    session = TorchSession(bundle, "cpu", precision)
    dn = smooth_pixels(3, n=7, side=96)
    together = session.classify(dn, 16, ALL)
    for size in (1, 3):
        parts = [session.classify(dn[i : i + size], 16, ALL) for i in range(0, 7, size)]
        apart = {layer: np.concatenate([part[layer] for part in parts]) for layer in ALL}
        assert_layers_agree(apart, together, share, steps)


# -- there and back ---------------------------------------------------------------------------------------------------


class RecordingLane(HostLane):
    """A device that is this machine, and notes what is asked of it."""

    def __init__(self, log):
        self.log = log

    @contextmanager
    def running(self):
        self.log.append("enter")
        yield
        self.log.append("leave")

    def upload(self, values):
        sent = super().upload(values)
        self.log.append(("upload", tuple(sent.shape), sent.dtype))
        return sent

    def download(self, values):
        self.log.append(("download", tuple(values.shape), values.dtype))
        return values

    def wait(self):
        self.log.append("wait")


def test_numbers_cross_as_they_are_stored_and_answers_as_bytes(session):
    dn, log = smooth_pixels(1, n=2, side=64), []
    expected = session.classify(dn, 8, ALL), session.probabilities(dn)
    session._lanes = Lanes([RecordingLane(log)])
    answer = session.classify(dn, 8, ALL)
    for layer in ALL:
        np.testing.assert_array_equal(answer[layer], expected[0][layer])
    assert log[:2] == ["enter", ("upload", (2, 4, 64, 64), torch.uint16)]
    assert log[-2:] == ["wait", "leave"]
    assert sorted(log[2:-2], key=str) == [
        ("download", (), torch.bool),  # whether all numbers are sound: looked at after the one wait
        ("download", (2, 3, 48, 48), torch.uint8),
        ("download", (2, 48, 48), torch.uint8),
        ("download", (2, 48, 48), torch.uint8),
    ]
    log.clear()
    np.testing.assert_array_equal(session.probabilities(dn), expected[1])
    assert [entry for entry in log if isinstance(entry, str)] == ["enter", "wait", "leave"]


def test_a_cuda_lane_pins_and_copies_in_its_own_stream(monkeypatch):
    log = []

    class Stream:
        def __init__(self, device):
            log.append("stream")

        def wait_stream(self, other):
            log.append(f"after the {other} stream")

        def synchronize(self):
            log.append("synchronize")

    @contextmanager
    def running(stream):
        log.append("enter")
        yield
        log.append("leave")

    def empty(*size, pin_memory, dtype):
        assert pin_memory
        log.append(f"pin {dtype}".replace("torch.", ""))
        return plain(*size, dtype=dtype)

    plain = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", running)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch, "empty", empty)
    lane, numbers = CudaLane(torch.device("cpu")), np.arange(12, dtype=">u2")[::-2]
    numbers.flags.writeable = False  # as dask hands arrays out
    with lane.running():
        answers = lane.download(lane.upload(numbers).to(torch.uint8) + 1)
        lane.wait()
    assert answers.tolist() == [12, 10, 8, 6, 4, 2]
    assert log == [
        "stream", "after the current stream", "enter", "pin uint16", "pin uint8", "synchronize", "leave",
    ]  # fmt: skip


def in_threads(tasks):
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_as_many_batches_at_once_as_there_are_lanes():
    lanes, both_in, busy = Lanes([HostLane(), HostLane()]), threading.Barrier(2), []

    def task():
        with lanes.borrow() as lane:
            both_in.wait(timeout=10)  # passes only in pairs
            busy.append(id(lane))
            assert len(busy) <= 2
            both_in.wait(timeout=10)
            busy.remove(id(lane))

    in_threads([task] * 4)
    assert lanes.count == 2
    lanes.narrow()
    lanes.narrow()
    assert lanes.count == 1
    with lanes.borrow():
        assert lanes._free.empty(), "no other lane is left"


# -- short of memory --------------------------------------------------------------------------------------------------

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def starve(session, pixels, monkeypatch, error=NO_MEMORY):
    """Give the network memory for so many pixels at a time; return the batches that it was shown."""
    network, seen = session._network, []

    def run(x):
        seen.append(len(x))
        if x[:, 0].numel() > pixels:
            raise error
        return network(x)

    monkeypatch.setattr(session, "_network", run)
    return seen


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        torch.AcceleratorError("CUDA error: out of memory"),  # of what torch's allocator does not keep
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["torch", "CUDA", "cuDNN 8", "cuDNN 9", "CPU"],
)
def test_a_batch_that_does_not_fit_is_halved(session, monkeypatch, error):
    dn = smooth_pixels(5, n=7, side=64)
    expected = session.classify(dn, 8, ALL)
    seen = starve(session, 2 * 64 * 64, monkeypatch, error)
    answer = session.classify(dn, 8, ALL)
    assert seen == [7, 3, *[1] * 7]
    assert_layers_agree(answer, expected)
    seen.clear()
    assert session.probabilities(dn).shape == (7, 3, 64, 64)
    assert seen == [1] * 7  # what failed once is not tried again
    assert session.batch(64, 64) == 1
    assert session.batch(32, 32) == 4, "the limit is one of pixels"


def test_a_batch_that_has_company_is_halved_before_the_company_is_given_up(session, monkeypatch):
    dn, log = smooth_pixels(5, n=3, side=64), []
    session._lanes = Lanes([RecordingLane(log), RecordingLane(log)])
    seen, network, fail = [], session._network, iter([True, True, False, False, False])

    def run(x):
        seen.append((len(x), session.parallel))
        if next(fail):
            raise torch.OutOfMemoryError("the other batch has it")
        return network(x)

    monkeypatch.setattr(session, "_network", run)
    assert session.classify(dn, 8, CLASS)["class"].shape == (3, 48, 48)
    assert seen == [(3, 2), (1, 2), (1, 1), (1, 1), (1, 1)]


def test_what_a_failure_held_is_given_back(session, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    starve(session, 2 * 64 * 64, monkeypatch)
    assert session._seconds(4, 64, 64) is None
    assert emptied == [True]
    session.classify(smooth_pixels(5, n=4, side=64), 8, CLASS)
    assert emptied == [True, True]


ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
INTERNAL = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")


@pytest.mark.parametrize("error", [ENGINE, INTERNAL], ids=["engine", "internal"])
def test_what_may_be_short_memory_is_taken_for_it_while_less_can_be_tried(session, monkeypatch, error):
    dn = smooth_pixels(5, n=4, side=64)
    with monkeypatch.context() as starved:
        seen = starve(session, 2 * 64 * 64, starved, error)
        session.classify(dn, 8, CLASS)
        assert seen == [4, 2, 2]
    starve(session, 10, monkeypatch, error)
    session._lanes = Lanes([HostLane(), HostLane()])
    with pytest.raises(RuntimeError, match=str(error)):
        session.classify(dn, 8, CLASS)
    assert session.parallel == 1, "alone it failed as well, so it was not the memory"


def test_short_memory_is_seen_behind_another_error():
    def compile_it(cause):
        try:
            raise cause
        except RuntimeError as error:
            raise RuntimeError("it does not compile") from error

    for cause, short in ((NO_MEMORY, True), (RuntimeError("an operator that nobody knows"), False)):
        with pytest.raises(RuntimeError) as caught:
            compile_it(cause)
        assert lacks_memory(caught.value) == short


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (448 * 448, "one of 448 x 448 px fits: use --core 256"),
        (479 * 479, "one of 448 x 448 px fits: use --core 256"),
        (288 * 288, "one of 288 x 288 px fits: use --core 96"),
        (287 * 287, "not even that of the smallest core, 96, fits: use a machine with more memory"),
    ],
)
def test_a_window_that_does_not_fit_is_named_with_a_core_that_would(bundle, session, monkeypatch, room, advice):
    asked = []

    def run(x):
        if x[:, 0].numel() > room:
            raise NO_MEMORY
        asked.append(x.shape[2:])
        return x.new_zeros(len(x), 3, *(n - 2 * 88 for n in x.shape[2:]))

    monkeypatch.setattr(session, "_trimmed", run)
    with pytest.raises(ModelError, match=rf"cpu has no memory for a window of 512 x 512 px; {advice}$"):
        session.classify(smooth_pixels(5, n=2, side=512), 96, ALL)
    if asked:
        core = max(asked)[0] - 2 * 96
        assert chunks_for(bundle, core).window == max(asked), "and the map asks for the same"


def test_a_window_of_one_size_that_does_not_fit_is_told_so(other_spec, network, tmp_path, monkeypatch):
    bundle = save_bundle(tmp_path, other_spec(global_context=True), network.state_dict())
    session = TorchSession(bundle, "cpu", "float32")
    starve(session, 10, monkeypatch)
    monkeypatch.setattr(session, "_trimmed", session._network)
    says = "have one size, whatever the core: use a machine with more memory, or a model with smaller windows$"
    with pytest.raises(ModelError, match=says):
        session.probabilities(smooth_pixels(5, side=64))
    session._device = torch.device("cuda")
    assert "whatever the core: use device 'cpu', or" in session._advice(0)


def test_a_gpu_measures_for_its_lanes_and_knows_what_its_kernels_count(bundle, session, cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    monkeypatch.setattr(session, "_seconds", lambda count, *size: float(count))
    for lanes in (1, 2):
        session._lanes = Lanes([HostLane()] * lanes)
        session._suit_a_gpu(bundle, "bfloat16")
        assert session.batch(64, 64) == 1
    assert session._limit == (2**31 - 1) // largest_image(session._network, 4)
    (notes,) = cache.iterdir()
    card = f"A Card, torch {torch.__version__}, bfloat16"
    assert set(json.loads(notes.read_text())) == {f"{card}, 1 at once", f"{card}, 2 at once"}


def test_batches_stay_below_what_torchs_kernels_count(session, monkeypatch):
    session._limit = session._most_pixels = 3 * 64 * 64
    dn, seen = smooth_pixels(5, n=7, side=64), starve(session, 7 * 64 * 64, monkeypatch)
    session.classify(dn, 8, CLASS)
    assert seen == [3, 3, 1]
    assert session._seconds(4, 64, 64) is None
    session._limit = 288 * 288
    with pytest.raises(ModelError, match=r"cannot count the numbers of a window of 320 x 320 px; .* use --core 96$"):
        session.classify(smooth_pixels(5, side=320), 96, CLASS)


def test_the_largest_image_counts_what_is_enlarged_and_joined(network):
    coarse, fine = torch.nn.Conv2d(4, 8, 2, stride=2), torch.nn.Conv2d(4, 5, 1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.coarse, self.fine, self.head = coarse, fine, torch.nn.Conv2d(13, 3, 1)

        def forward(self, x):
            enlarged = torch.nn.functional.interpolate(self.coarse(x), scale_factor=2)
            return self.head(torch.cat([enlarged, self.fine(x)], dim=1))

    assert largest_image(Net().eval(), 4) == 13
    assert largest_image(network, 4) >= 16


def test_any_other_error_is_raised_and_leaves_the_lane_free(session, monkeypatch):
    seen = []

    def fail(x):
        seen.append(len(x))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        broken.setattr(session, "_network", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            session.classify(smooth_pixels(5, n=4, side=64), 8, ALL)
    assert seen == [4], "not tried again"
    assert session.classify(smooth_pixels(5, side=64), 8, CLASS)["class"].shape == (1, 48, 48)


def test_numbers_that_overflow_do_not_make_a_map(session, monkeypatch):
    monkeypatch.setattr(session, "_network", lambda x: torch.full((len(x), 3, *x.shape[2:]), torch.inf))
    with pytest.raises(ModelError, match=r"NaN or infinity: its weights or scaling are broken$"):
        session.classify(smooth_pixels(5, side=64), 8, CLASS)
    session._autocast = torch.float16
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: HostLane().running())  # a CPU would be slow at it
    with pytest.raises(ModelError, match="too large for float16: use precision 'bfloat16'"):
        session.classify(smooth_pixels(5, side=64), 8, CLASS)
