import json
import math

import numpy as np
import pytest
import torch

from evac_jax.errors import DataError, TrainingError
from evac_jax.evac import model_folders
from evac_jax.files import recordings
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.episodes import collect
from evac_jax.tools.reward import train as train_reward


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A recording, and the same once more as if a perfect world model had imagined it."""
    folder = tmp_path_factory.mktemp("reward")
    real = collect.collect(folder / "real", 160, {"expert": 0.5, "random": 0.5}, image_size=32)
    _write_imagined(real, folder / "imagined", (0, 1))
    _write_imagined(real, folder / "turned", (1, 0))
    return folder


def _write_imagined(real, folder, numbers):
    """Write `real` as if it was imagined, its task t under the number numbers[t]."""
    with recordings.EpisodeWriter(
        folder,
        image_shape=real.frames.shape[1:],
        instructions=[real.instructions[number] for number in numbers],
        sources=[f"imagined:{source}" for source in real.sources],
        intrinsic=real.intrinsic,
        c2w=real.c2w,
        facts={},
    ) as writer:
        for n in range(real.num_episodes):
            rows = real.rows(n, np.arange(real.length[n] + 1))
            writer.add(
                frames=real.frames[rows],
                actions=real.actions[rows[:-1]],
                poses=real.poses[rows],
                success=real.success[rows],
                task=numbers[int(real.task[n])],
                source=int(real.source[n]),
            )


def test_hard_negatives_are_failed_imagined_frames_that_look_like_success(folders):
    data = recordings.load(folders / "real", folders / "imagined")
    sampler = train_reward.FrameSampler(data, 2, np.random.default_rng(0))
    gullible = RewardNet(RewardConfig(width=4, num_instructions=2))
    with torch.no_grad():
        gullible.net[-1].bias.fill_(100)
    assert sampler.mine(gullible) > 0
    rows = sampler._row[sampler._hard]
    episode = np.searchsorted(np.sort(data.first), rows, side="right") - 1
    episode = np.argsort(data.first)[episode]
    assert not data.success_once()[episode].any()
    assert all(data.sources[s].startswith("imagined:") for s in data.source[episode])
    _, _, labels = sampler.draw(40)
    assert labels.sum() == 14
    with torch.no_grad():
        gullible.net[-1].bias.fill_(-100)
    assert sampler.mine(gullible) == 0


@pytest.mark.parametrize("single", [False, True])
def test_command_writes_a_calibrated_classifier_and_its_card(folders, tmp_path, single):
    arguments = ["--data", folders / "real", "--imagined", folders / "imagined"]
    arguments += ["--out", tmp_path / "out", "--steps", "60", "--width", "4"]
    arguments += ["--judged_frames", "2"] + ["--single_task"] * single
    train_reward.main([str(part) for part in arguments])
    model = model_folders.load_model(tmp_path / "out", kind="RewardNet")
    assert model.config.num_instructions == (0 if single else 2)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["scores"]["threshold"] == 0.5
    assert 0 < card["calibration"]["threshold"] < 1
    assert len(card["scores"]["false_success_95"]) == 2
    assert (card["judged_frames"], card["chunk"], card["scores"]["success_frames"]) == (2, 8, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_held_out_frames_of_one_kind_are_refused_before_anything_is_trained(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_reward, "train", lambda *_, **__: pytest.fail("trained"))
    data = recordings.load(folders / "imagined")
    failed = data.select(np.flatnonzero(~data.success_once()))
    _write_imagined(failed, tmp_path / "failed", (0, 1))
    arguments = ["--data", folders / "real", "--imagined", tmp_path / "failed"]
    with pytest.raises(DataError, match=r"held-out frames that are judged are failures"):
        train_reward.main([str(part) for part in (*arguments, "--out", tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_frames_that_no_held_out_episode_has_are_refused_before_anything_is_trained(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_reward, "train", lambda *_, **__: pytest.fail("trained"))
    arguments = ["--data", folders / "real", "--imagined", folders / "imagined", "--chunk", 33]
    arguments += ["--success_frames", 33, "--out", tmp_path / "out"]
    with pytest.raises(DataError, match="--success_frames: expected at most 32, .*got 33"):
        train_reward.main([str(part) for part in arguments])


@pytest.mark.parametrize("place", ["calibration.calibrate", "scores", "cards.write_json"])
@pytest.mark.parametrize("error", [TrainingError, OSError, ValueError])
def test_what_was_trained_is_kept_where_it_cannot_be_judged(
    folders, tmp_path, monkeypatch, place, error
):
    def fail(*_):
        raise error("a test")

    monkeypatch.setattr(f"{train_reward.__name__}.{place}", fail)
    earlier = tmp_path / "out.uncalibrated"
    earlier.mkdir()
    (earlier / "mine").touch()
    arguments = ["--data", folders / "real", "--imagined", folders / "imagined", "--steps", "2"]
    arguments += ["--width", "4", "--out", tmp_path / "out"]
    told = error is not ValueError and place != "cards.write_json"
    with pytest.raises(
        TrainingError if told else error,
        match=r"a test. It is kept in .*out.uncalibrated" if told else "a test",
    ):
        train_reward.main([str(part) for part in arguments])
    model_folders.load_model(tmp_path / "out.uncalibrated", kind="RewardNet")
    assert (tmp_path / "out_1.uncalibrated" / "mine").exists()
    assert not (tmp_path / "out").exists()


def test_differently_imagined_recordings_are_refused(tmp_path):
    for name, steps in (("one", 2), ("alike", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        card = {"sampling": {"steps": steps, "eta": 0.0}}
        (tmp_path / name / "card.json").write_text(json.dumps(card))
    one, alike, other = (str(tmp_path / name) for name in ("one", "alike", "other"))
    assert train_reward.sampling_of([one, alike]) == {"steps": 2, "eta": 0.0}
    assert train_reward.sampling_of([]) is None
    with pytest.raises(DataError, match="expected all to be imagined alike"):
        train_reward.sampling_of([one, other])


def test_classifier_is_the_same_when_imagined_episodes_list_their_tasks_otherwise(
    folders, tmp_path
):
    found = []
    for name in ("imagined", "turned"):
        arguments = ["--data", folders / "real", "--imagined", folders / name]
        arguments += ["--out", tmp_path / name, "--steps", 30, "--width", 4, "--threads", 1]
        train_reward.main([str(part) for part in arguments])
        card = json.loads((tmp_path / name / "card.json").read_text())
        found.append((card["instructions"], card["calibration"], card["scores"], card["sha256"]))
    assert found[0] == found[1]


def test_frames_and_chunk_must_fit_together():
    with pytest.raises(SystemExit):
        train_reward.parse(["--data", "a", "--out", "b", "--judged_frames", "1"])


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


def test_shifted_frames_are_moved_by_a_few_pixels_each_on_its_own():
    torch.manual_seed(0)
    frames = torch.full((64, 3, 8, 10), -1.0)
    frames[:, :, 4, 5] = 1
    moved = train_reward.shift(frames, 2)
    row, column = np.divmod(moved[:, 0].flatten(1).argmax(1).numpy(), 10)
    assert moved.shape == frames.shape
    assert (moved.flatten(1).sum(1) == frames[0].sum()).all()
    assert set(row) == set(range(2, 7))
    assert set(column) == set(range(3, 8))
    assert len(set(zip(row, column, strict=True))) > 15


def test_shifted_frames_repeat_their_edges():
    rows = torch.arange(8.0).expand(32, 3, 10, 8).transpose(2, 3)
    moved = train_reward.shift(rows, 3)[:, 0, :, 0]
    tops, bottoms = set(moved[:, 0].tolist()), set(moved[:, -1].tolist())
    assert tops == {0.0, 1, 2, 3}
    assert bottoms == {4.0, 5, 6, 7}
    assert (moved[moved[:, 1] == 0][:, 0] == 0).all()


def test_classifier_learns_to_tell_success_apart(recording, tmp_path):
    model = train_reward.train(
        recording, RewardConfig(width=4, num_instructions=3), steps=60, batch=32
    )
    model_folders.save_model(tmp_path, model, torch.float16)
    model = model_folders.load_model(tmp_path, kind="RewardNet")
    values = train_reward.scores(model, recording)
    success = train_reward.by_episode(recording, recording.success)
    assert values[success].mean() > values[~success].mean() + 0.5


def test_existing_folder_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError, match=f"--out: {tmp_path} exists"):
        train_reward.main(["--data", "nowhere", "--out", str(tmp_path)])


def test_loss_that_is_not_finite_ends_the_training(recording):
    config = RewardConfig(width=4, num_instructions=3)
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        train_reward.train(recording, config, steps=3, batch=8, lr=math.inf)
