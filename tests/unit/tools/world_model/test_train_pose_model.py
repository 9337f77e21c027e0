import dataclasses
import json
import math

import numpy as np
import pytest

from evac_jax.errors import DataError, TrainingError
from evac_jax.files import cards, recordings
from evac_jax.sim.pose_model import PoseModelConfig
from evac_jax.tools.episodes import collect
from evac_jax.tools.world_model import train_pose_model


@pytest.fixture(scope="module")
def recording_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings") / "mixed"
    collect.collect(folder, 24, {"expert": 0.5, "random": 0.5}, image_size=32)
    return folder


@pytest.fixture(scope="module")
def recording(recording_folder):
    return recordings.load(recording_folder)


def test_pose_model_follows_recorded_transitions(recording):
    model = train_pose_model.train(
        recording, PoseModelConfig(hidden=32, linear_skip=True), steps=300, batch=128
    )
    scores = train_pose_model.score(model, recording)
    assert scores["position_mm_mean"] < 60
    assert scores["opening_max"] < 0.4


def test_pose_model_with_velocity_follows_an_arm_that_has_mass(recording):
    """Half of every change goes on after its action; without velocity that cannot be known."""
    poses, rng = np.zeros_like(recording.poses), np.random.default_rng(0)
    actions = rng.normal(size=recording.actions.shape).astype(np.float32)
    for episode, length in enumerate(recording.length):
        change = np.zeros(3)
        for row in recording.rows(episode, np.arange(length)):
            change = 0.5 * change + 0.05 * actions[row, :3]
            poses[row + 1, :3] = poses[row, :3] + change
    data = dataclasses.replace(recording, poses=poses, actions=actions)

    def drift(**config):
        config = PoseModelConfig(hidden=32, linear_skip=True, **config)
        model = train_pose_model.train(data, config, steps=300, batch=128)
        return train_pose_model.score(model, data)["position_mm_mean"]

    assert 2 * drift(velocity=True) < drift()


def test_recording_without_held_out_episodes_is_refused_before_anything_is_trained(tmp_path):
    collect.collect(tmp_path / "few", 2, {"expert": 1.0}, image_size=32)
    with pytest.raises(DataError, match="0 held-out episodes; both are needed"):
        train_pose_model.main(["--data", str(tmp_path / "few"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError, match=f"--out: {tmp_path} exists"):
        train_pose_model.main(["--data", "nowhere", "--out", str(tmp_path)])


def test_loss_that_is_not_finite_ends_the_training(recording):
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        train_pose_model.train(recording, PoseModelConfig(hidden=8), steps=3, batch=8, lr=math.inf)


def test_model_is_saved_before_it_is_scored(recording_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--data", str(recording_folder), "--out", str(out), "--steps", "2"]

    def fail(*_):
        raise ValueError("a test")

    with monkeypatch.context() as patch:
        patch.setattr(train_pose_model, "score", fail)
        with pytest.raises(ValueError, match="a test"):
            train_pose_model.main(arguments)
    card = json.loads((out / "card.json").read_text())
    assert card["sha256"] == cards.sha256(out / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    out.rename(tmp_path / "unscored")
    train_pose_model.main(arguments)
    scored = json.loads((out / "card.json").read_text())
    assert scored["sha256"] == card["sha256"]
    assert scored["scores"]["position_mm_mean"] > 0
