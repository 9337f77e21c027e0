import numpy as np
import pytest
import torch

from evac_jax.evac import checkpoint
from evac_jax.sim.pose_model import PoseModelConfig
from evac_jax.sim.reward import RewardConfig
from evac_jax.tools.episodes import collect
from evac_jax.tools.reward import train as train_reward
from evac_jax.tools.world_model import train_pose_model


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings") / "mixed"
    return collect.collect(folder, 24, {"expert": 0.5, "random": 0.5}, image_size=32)


def test_batch_holds_successes_asked_about_with_another_instruction(recording):
    sampler = train_reward.FrameSampler(recording, 3, np.random.default_rng(0))
    frames, task, labels = sampler.draw(40)
    assert labels.sum() == 14
    assert labels[14:].sum() == 0
    stored = recording.stacked("frames")[recording.success_once(), :, 0]
    of_episode = recording.task[recording.success_once()]
    for frame, asked in zip(frames[14:20].numpy(), task[14:20], strict=True):
        episode = np.nonzero((stored == frame).all((-1, -2, -3)).any(1))[0][0]
        assert of_episode[episode] != asked


def test_disturbed_frames_stay_in_range_and_similar():
    torch.manual_seed(0)
    frames = torch.rand(8, 3, 16, 16) * 2 - 1
    disturbed = train_reward.disturb(frames)
    assert disturbed.shape == frames.shape
    assert disturbed.abs().max() <= 1
    assert 0 < (disturbed - frames).abs().mean() < 0.5


def test_classifier_learns_to_tell_success_apart(recording, tmp_path):
    model = train_reward.train(
        recording, RewardConfig(width=4, num_instructions=3), steps=60, batch=32
    )
    checkpoint.save_model(tmp_path, model, torch.float16)
    model = checkpoint.load_model(tmp_path, kind="RewardNet")
    values = train_reward.scores(model, recording)
    success = train_reward.by_episode(recording, recording.success)
    assert values[success].mean() > values[~success].mean() + 0.5


def test_pose_model_follows_recorded_transitions(recording):
    model = train_pose_model.train(
        recording, PoseModelConfig(hidden=32, linear_skip=True), steps=300, batch=128
    )
    scores = train_pose_model.score(model, recording)
    assert scores["position_mm_mean"] < 60
    assert scores["opening_max"] < 0.4
