import errno
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from s2seg.errors import InputError, OutputError
from s2seg.training import checkpoints
from s2seg.training.checkpoints import BestAndLast, WholeFiles, load_checkpoint

OURS = {"state_dict": {"network.a": torch.ones(2)}, "callbacks": {BestAndLast.state_key: {"best_epoch": 1}}}


@pytest.mark.parametrize("content", [OURS, {"state_dict": OURS["state_dict"]}])
def test_loads_what_training_saves(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt").keys() == content.keys()


def test_a_full_disk_is_told_with_the_way_on_that_there_is(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    for name, says in (("best.ckpt", r"; train anew, with --overwrite$"), ("last.ckpt", r"is whole \(--resume\)$")):
        with pytest.raises(OutputError, match=says):
            WholeFiles().save_checkpoint(OURS, tmp_path / name)
        (tmp_path / "last.ckpt").write_bytes(b"of the first epoch")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"model.a": torch.ones(2)}},
        {"state_dict": []},
        {**OURS, "callbacks": None},
        {**OURS, "callbacks": {"ModelCheckpoint": {}}},
        [],
    ],
)
def test_a_checkpoint_of_another_program_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt is damaged, or no checkpoint of s2seg: train anew") as caught:
        load_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(caught.value)


PICKLED = pickle.dumps(["state", Path("a")], protocol=2)


@pytest.mark.parametrize("pickled", [b"", b"junk", PICKLED, PICKLED[:-9], PICKLED[:2] + b"\x86"])
def test_a_damaged_archive_is_one_line(tmp_path, pickled):
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    with pytest.raises(InputError, match=r"last\.ckpt cannot be read \(\w+\): train anew"):
        load_checkpoint(tmp_path / "last.ckpt")
