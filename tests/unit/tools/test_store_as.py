import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evac_jax.errors import CheckpointError, DataError, StorageError
from evac_jax.files import cards
from evac_jax.tools.store_as import store
from tests.unit.full_disk import full_disk

VALUES = np.array([1.0, 1 + 2**-10, -3.5, 0.1], np.float32)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"w": VALUES, "ids": np.arange(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"torch_dtype": "float32", "text_config": {"torch_dtype": "float32", "width": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "card.json").write_text(json.dumps({"scores": 1, "sha256": "of the large one"}))
    (folder / "progress.pt").write_text("not weights")
    return folder


def test_floats_are_rounded_and_everything_else_goes_along(source, tmp_path):
    store(source, tmp_path / "out", "float16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["w"].dtype == np.float16
    np.testing.assert_array_equal(stored["w"], VALUES.astype(np.float16))
    np.testing.assert_array_equal(stored["ids"], np.arange(3))
    card = cards.read(tmp_path / "out")
    assert card["stored_as"] == "float16"
    assert card["scores"] == 1
    assert card["sha256"] == cards.sha256(tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out" / "progress.pt").exists()


def test_full_disk_and_damaged_weights_are_told_and_leave_nothing(source, tmp_path):
    with pytest.raises(StorageError, match="out cannot be written"), full_disk(100):
        store(source, tmp_path / "out", "float16")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        store(source, tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out*"))


def test_policy_configuration_names_its_precision(source, tmp_path):
    store(source, tmp_path / "out", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert config["text_config"]["width"] == 3


def test_values_that_do_not_fit_are_refused_and_leave_nothing(source, tmp_path):
    save_file({"w": np.array([1e6], np.float32)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="w: a value is not finite as float16"):
        store(source, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    store(source, tmp_path / "out", "bfloat16")
    with pytest.raises(CheckpointError, match="exists"):
        store(source, tmp_path / "out", "bfloat16")


def test_configuration_of_bytes_that_are_no_text_is_refused_by_name(source, tmp_path):
    (source / "config.json").write_bytes(b'{"torch_dtype": "\xff"}')
    with pytest.raises(DataError, match=r"config\.json: expected a JSON object"):
        store(source, tmp_path / "out", "float16")
