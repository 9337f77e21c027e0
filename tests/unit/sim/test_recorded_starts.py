import dataclasses

import numpy as np
import pytest
import torch

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import recordings
from evac_jax.miniature.env import GroundTruthConfig, GroundTruthEnv
from evac_jax.miniature.starts import MiniatureStarts
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.initial_states import make_initial_states
from evac_jax.sim.recorded_starts import Keyframes, RecordedStarts, WithKeyframes
from evac_jax.tools.episodes import collect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("recording") / "data"
    collect.collect(out, 24, {"expert": 0.5, "random": 0.5})
    return out


def test_starts_of_a_recording_are_the_first_frames_of_its_training_part(folder):
    training = recordings.load(folder).split()[0]
    source = make_initial_states("recording", str(folder))
    assert source.num_starts == training.num_episodes
    starts = source.load(np.array([3, 0]))
    np.testing.assert_array_equal(starts.images, training.frames[training.first[[3, 0]]])
    texts = [source.instructions[task] for task in starts.task]
    assert texts == [training.instructions[task] for task in training.task[[3, 0]]]


def test_instructions_that_no_episode_has_are_left_out(folder):
    data = recordings.load(folder)
    blue = RecordedStarts(data.select(data.task == 1))
    assert blue.instructions == (data.instructions[1],)
    assert (blue.load(np.arange(3)).task == 0).all()


class Elsewhere(MiniatureStarts):
    """Scenes whose list of instructions is another one."""

    def __init__(self, instructions):
        super().__init__()
        self.instructions = instructions


@pytest.mark.parametrize("instructions", [INSTRUCTIONS[::-1], INSTRUCTIONS[:1], ("push",)])
def test_keyframes_keep_their_texts_when_other_starts_list_theirs_differently(folder, instructions):
    keyframes = Keyframes(str(folder))
    source = WithKeyframes(Elsewhere(instructions), keyframes)
    assert source.instructions[: len(instructions)] == instructions
    ids = KEYFRAMES + np.arange(keyframes.count)
    episodes, data = keyframes.find(ids)[0], keyframes.data
    texts = [source.instructions[task] for task in source.load(ids).task]
    assert texts == [data.instructions[task] for task in data.task[episodes]]
    assert set(texts) == set(INSTRUCTIONS)


def test_keyframes_lie_behind_the_first_frame_and_before_success(folder):
    keyframes = Keyframes(str(folder))
    episodes, steps = keyframes.find(KEYFRAMES + np.arange(keyframes.count))
    data = keyframes.data
    assert not data.held_out.any()
    assert steps.min() == 1
    assert (steps < data.length[episodes]).all()
    assert not data.success[data.rows(episodes, steps)].any()
    ends = {n: steps[episodes == n].max() for n in set(episodes)}
    for n, end in ends.items():
        success = data.success[data.rows(n, np.arange(data.length[n] + 1))]
        assert end + 1 == (success.argmax() if success.any() else data.length[n])
    with pytest.raises(DataError, match="expected ids within"):
        keyframes.find(np.array([KEYFRAMES + keyframes.count]))


def test_keyframes_and_plain_starts_come_in_the_order_of_their_ids(folder):
    keyframes, plain = Keyframes(str(folder)), MiniatureStarts()
    source = WithKeyframes(plain, keyframes)
    assert (source.num_starts, source.num_keyframes) == (plain.num_starts, keyframes.count)
    ids = np.array([5, KEYFRAMES + 9, KEYFRAMES, 7])
    starts = source.load(ids)
    expected = plain.load(np.array([5, 7]))
    episodes, steps = keyframes.find(ids[1:3])
    recorded = keyframes.data.rows(episodes, steps)
    np.testing.assert_array_equal(starts.images[[0, 3]], expected.images)
    np.testing.assert_array_equal(starts.images[1:3], keyframes.data.frames[recorded])
    np.testing.assert_array_equal(starts.poses[1:3], keyframes.data.poses[recorded])


def test_pictures_of_another_size_are_refused(folder):
    with pytest.raises(ConfigError, match="record them alike"):
        WithKeyframes(MiniatureStarts(image_size=32), Keyframes(str(folder)))


def test_keyframes_of_another_camera_are_refused(folder):
    source = MiniatureStarts()
    intrinsic, c2w = source.camera
    source.camera = intrinsic, c2w + 0.01 * np.eye(4, k=3)  # 1 cm beside it
    with pytest.raises(ConfigError, match="expected the camera of the other initial states"):
        WithKeyframes(source, Keyframes(str(folder)))


def test_camera_of_keyframes_is_said_to_be_assumed_when_they_do_not_know_it(folder, caplog):
    keyframes = Keyframes(str(folder))
    keyframes.camera = None
    with caplog.at_level("WARNING", logger="absl"):
        WithKeyframes(MiniatureStarts(), keyframes)
    assert ["taken for that of the other initial states" in m for m in caplog.messages] == [True]


def test_ground_truth_begins_exactly_where_the_recording_was(folder):
    keyframes = Keyframes(str(folder))
    ids = KEYFRAMES + np.linspace(0, keyframes.count - 1, 6).astype(np.int64)
    starts = np.concatenate((ids, [11]))
    env = GroundTruthEnv(GroundTruthConfig(num_envs=7, keyframe_data=str(folder)))
    assert env.spec.num_keyframes == keyframes.count
    frames = torch.zeros(7, *env.spec.image_shape, dtype=torch.uint8)
    result = env.reset(starts, 0, frames, torch.zeros(0, 8, *env.spec.image_shape))
    rows = keyframes.data.rows(*keyframes.find(ids))
    np.testing.assert_array_equal(frames[:6].numpy(), keyframes.data.frames[rows])
    np.testing.assert_array_equal(result.proprio[:6], keyframes.data.poses[rows])
    plain = MiniatureStarts().load(np.array([11]))
    np.testing.assert_array_equal(frames[6:].numpy(), plain.images)


def test_keyframe_ids_mean_nothing_to_a_ground_truth_without_them():
    env = GroundTruthEnv(GroundTruthConfig(num_envs=1))
    frames = torch.zeros(1, *env.spec.image_shape, dtype=torch.uint8)
    with pytest.raises(DataError, match="start ids"):
        env.reset(np.array([KEYFRAMES]), 0, frames, torch.zeros(0, 8, *env.spec.image_shape))


def test_recording_without_start_ids_cannot_be_repeated_in_the_ground_truth(folder, monkeypatch):
    data = recordings.load(folder)
    unknown = dataclasses.replace(data, start=np.full_like(data.start, -1))
    monkeypatch.setattr(recordings, "load", lambda *folders: unknown)
    with pytest.raises(ConfigError, match="without a start id"):
        GroundTruthEnv(GroundTruthConfig(num_envs=1, keyframe_data=str(folder)))


def test_start_ids_of_another_ground_truth_are_refused_when_their_instructions_differ(
    folder, monkeypatch
):
    data = recordings.load(folder)
    monkeypatch.setattr(
        recordings, "load", lambda *_: dataclasses.replace(data, task=1 - data.task)
    )
    with pytest.raises(ConfigError, match="is no recording of this ground truth: episode 0"):
        GroundTruthEnv(GroundTruthConfig(num_envs=1, keyframe_data=str(folder)))
