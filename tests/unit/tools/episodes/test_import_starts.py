import json

import numpy as np
import pytest
from PIL import Image

from evac_jax.errors import EvacJaxError
from evac_jax.files import cards
from evac_jax.sim.initial_states import NpyStarts
from evac_jax.tools.episodes import import_starts

POSE = [0.4, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0, 0.5]


@pytest.fixture
def source(tmp_path):
    """Two starts of 8 x 6 pixels, and their camera."""
    for name, value in (("a", 10), ("b", 200)):
        Image.new("RGB", (8, 6), (value, 0, 0)).save(tmp_path / f"{name}.png")
    camera = {"intrinsic": [[[8, 0, 4], [0, 8, 3], [0, 0, 1]]], "c2w": [np.eye(4).tolist()]}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    describe(tmp_path, "a.png", "b.png")
    return tmp_path


def describe(folder, *names, **changes):
    texts = ("open it", "close it")
    entries = [
        {"image": name, "instruction": text, "pose": POSE} | changes
        for name, text in zip(names, texts, strict=False)
    ]
    (folder / "starts.json").write_text(json.dumps(entries))


def run(source, *args):
    camera = ["--camera", str(source / "camera.json")]
    import_starts.main(["--source", str(source), "--out", str(source / "out"), *camera, *args])
    return NpyStarts(str(source / "out"))


def test_pictures_become_initial_states_with_their_camera(source):
    starts = run(source)
    assert (starts.num_starts, starts.instructions) == (2, ("open it", "close it"))
    loaded = starts.load(np.array([1, 0]))
    assert loaded.images.shape == (2, 1, 6, 8, 3)
    np.testing.assert_array_equal(loaded.images[:, 0, 2, 2, 0], [200, 10])
    np.testing.assert_array_equal(loaded.poses[0], np.float32(POSE))
    assert loaded.task.tolist() == [1, 0]
    assert starts.camera_size == (6, 8)
    np.testing.assert_array_equal(starts.camera[0][0], [[8, 0, 4], [0, 8, 3], [0, 0, 1]])
    assert "command" in cards.read(source / "out")


def test_camera_follows_when_pictures_are_resized(source):
    starts = run(source, "--image_size", "12")
    assert starts.load(np.array([0])).images.shape == (1, 1, 12, 12, 3)
    np.testing.assert_array_equal(starts.camera[0][0], [[12, 0, 6], [0, 16, 6], [0, 0, 1]])


def test_several_cameras_take_a_picture_each(source):
    camera = json.loads((source / "camera.json").read_text())
    (source / "camera.json").write_text(json.dumps({k: v * 2 for k, v in camera.items()}))
    describe(source, ["a.png", "b.png"])
    assert run(source).load(np.array([0])).images.shape == (1, 2, 6, 8, 3)


@pytest.mark.parametrize(
    ("names", "changes", "told"),
    [
        (["a.png"], {"pose": POSE[:7]}, "entry 0: expected 8 numbers"),
        (["a.png"], {"pose": [2.0] * 8}, "quaternion's length"),
        (["a.png"], {"instruction": ""}, "a text as instruction"),
        (["a.png"], {"reward": 1}, 'expected {"image"'),
        (["none.png"], {}, "none.png"),
        ([["a.png", "b.png"], "a.png"], {}, "entry 1: pictures"),
        ([], {}, "one entry per start"),
    ],
)
def test_entry_at_fault_is_named_and_nothing_left(source, names, changes, told):
    describe(source, *names, **changes)
    with pytest.raises(EvacJaxError, match=told):
        run(source)
    assert not list(source.glob("out*"))


def test_damaged_picture_is_named(source):
    (source / "a.png").write_bytes((source / "a.png").read_bytes()[:40])
    with pytest.raises(EvacJaxError, match=".*entry 0"):
        run(source)
