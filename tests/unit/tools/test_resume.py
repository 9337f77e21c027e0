import os

import numpy as np
import pytest
import torch

from evac_jax.errors import CheckpointError, DataError, StorageError
from evac_jax.tools import torch_training
from evac_jax.tools.policy import finetune
from evac_jax.tools.resume import check_folder
from tests.unit.full_disk import full_disk

SETUP = {"lr": 0.1}
VALUES = np.random.default_rng(0).normal(size=20_000).astype(np.float32)


class Torch:
    """The progress of world models and autoencoders."""

    @staticmethod
    def save(path, values):
        torch_training.save_progress(path, {"setup": SETUP, "values": torch.from_numpy(values)})

    @staticmethod
    def load(path):
        return torch_training.load_progress(path, SETUP, torch.device("cpu"))["values"].numpy()


class Jax:
    """The progress of policies."""

    @staticmethod
    def save(path, values):
        finetune.save_progress(path, SETUP, {"values": values}, {"step": 1})

    @staticmethod
    def load(path):
        return finetune.load_progress(path, SETUP, {"values": VALUES})[0]["values"]


@pytest.mark.parametrize("tool", [Torch, Jax])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.5, 0.99999])
def test_progress_that_was_cut_short_is_told(tmp_path, tool, share):
    path = tmp_path / "progress"
    tool.save(path, VALUES)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(CheckpointError, match=f"^{path} is damaged .*: remove it to begin anew$"):
        tool.load(path)


def test_progress_whose_numbers_have_changed_is_told(tmp_path):
    path = tmp_path / "progress"
    Torch.save(path, VALUES)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(512))
    with pytest.raises(CheckpointError, match=r"is damaged .its part .* has changed.: remove it"):
        Torch.load(path)


@pytest.mark.parametrize("tool", [Torch, Jax])
@pytest.mark.parametrize("free", [10, 2_000, 50_000, len(VALUES) * 4])
def test_last_progress_stays_when_the_disk_is_full(tmp_path, tool, free):
    path = tmp_path / "progress"
    tool.save(path, VALUES)
    with (
        pytest.raises(
            StorageError, match=f"^{path} cannot be written: .*File too large.*make room"
        ),
        full_disk(free),
    ):
        tool.save(path, -VALUES)
    np.testing.assert_array_equal(tool.load(path), VALUES)
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_folder_of_the_tools_own_is_continued(tmp_path):
    check_folder(tmp_path / "new", "progress.pt")
    check_folder(tmp_path, "progress.pt")  # empty
    (tmp_path / ".tmp-progress.pt").touch()  # of a run that was killed while it saved
    check_folder(tmp_path, "progress.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="nothing to go on with .no progress.pt.; choose another"):
        check_folder(tmp_path, "progress.pt", "tensorboard")
    with pytest.raises(DataError, match="config.json exists"):
        check_folder(tmp_path / "config.json", "progress.pt")
    (tmp_path / "tensorboard").mkdir()
    check_folder(tmp_path, "progress.pt", "tensorboard")


def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file, .*; choose another folder"):
        check_folder(tmp_path / "file" / "out", "progress.pt")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may do all
    for out in (tmp_path / "out", tmp_path):
        (tmp_path / "file").unlink(missing_ok=True)
        with pytest.raises(StorageError, match="cannot be written to; choose another folder"):
            check_folder(out, "progress.pt")
