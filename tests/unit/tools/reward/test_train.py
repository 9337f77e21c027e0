import json

import numpy as np
import pytest
import torch

from evac_jax.errors import TrainingError
from evac_jax.evac import checkpoint
from evac_jax.files import recordings
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.episodes import collect
from evac_jax.tools.reward import calibration
from evac_jax.tools.reward import train as train_reward


def test_verdicts_count_runs_of_frames_and_whole_episodes():
    values = np.array([[0.1, 0.9, 0.9, 0.2], [0.9, 0.1, 0.9, 0.1], [0.9, 0.9, 0.1, 0.1]])
    success = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    verdict = calibration.judge(values, success, 0.8, 2)
    assert verdict["frame_recall"] == 1.0
    assert verdict["frame_precision"] == 3 / 6
    assert verdict["false_success"] == 0.5  # of two claims the third episode's is wrong
    assert verdict["agreement"] == pytest.approx(1 / 3)
    assert verdict["missed_success"] == 0.5  # the second one has no two frames in a row


def test_frames_that_are_not_judged_never_count():
    values = np.array([[0.9, -np.inf, 0.9, 0.9]])
    success = np.array([[True, True, False, False]])
    verdict = calibration.judge(values, success, 0.5, 2)
    assert verdict["frame_recall"] == 1.0
    assert verdict["frame_accuracy"] == pytest.approx(1 / 3)


def test_judged_frames_are_the_last_of_every_chunk_behind_the_first_frame():
    judged = calibration.judged_steps(16, chunk=8, last=2)
    assert np.flatnonzero(judged).tolist() == [7, 8, 15, 16]
    assert calibration.judged_steps(3, chunk=8, last=0).tolist() == [False] + [True] * 3


def test_threshold_is_the_middle_of_those_strict_enough_that_miss_least():
    values = np.array([[2.0, 2.0], [-1.0, -1.0]])
    success = np.array([[True, True], [False, False]])
    verdict = calibration.choose_threshold(values, success, 2, allowed=0.0)
    assert verdict["threshold"] == pytest.approx(0.5, abs=0.06)
    assert verdict["false_success"] == verdict["missed_success"] == 0


def test_where_no_threshold_is_strict_enough_the_strictest_that_claims_anything_is_taken():
    values = np.array([[3.0], [2.0], [1.0]])
    success = np.array([[False], [True], [False]])
    verdict = calibration.choose_threshold(values, success, 1, allowed=0.1)
    assert verdict["false_success"] == 0.5
    assert 1 < verdict["threshold"] <= 2


def test_platt_scaling_finds_the_line_that_made_the_labels():
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal(20000)
    labels = rng.random(20000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    assert calibration.platt_scale(logits, labels) == pytest.approx((0.5, -1), abs=0.08)


@pytest.mark.parametrize("labels", [np.ones(8, bool), np.array([True] * 4 + [False] * 4)])
def test_scores_that_say_nothing_are_not_calibrated(labels):
    with pytest.raises(TrainingError, match="cannot calibrate"):
        calibration.platt_scale(np.arange(8.0), labels)


def test_after_calibration_half_is_the_threshold_of_the_stated_false_share():
    torch.manual_seed(0)
    model = RewardNet(RewardConfig(width=4)).eval()
    frames = torch.rand(60, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = model(frames).numpy().reshape(30, 2)
    success = np.repeat(before.min(1, keepdims=True) > np.median(before.min(1)), 2, axis=1)
    success[before.min(1).argmax()] = False  # the surest claim is wrong
    wanted = calibration.choose_threshold(
        before, success, 2, 0.1, np.linspace(before.min(), before.max(), 200)
    )
    stated = calibration.calibrate(model, before, success, 2, 0.1)
    with torch.no_grad():
        after = model(frames).numpy().reshape(30, 2)
    verdict = calibration.judge(after, success, 0.0, 2)
    assert verdict["false_success"] <= 0.1
    assert verdict["missed_success"] == wanted["missed_success"]
    assert 0 < stated["threshold"] < 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A recording, and the same once more as if a perfect world model had imagined it."""
    folder = tmp_path_factory.mktemp("reward")
    real = collect.collect(folder / "real", 160, {"expert": 0.5, "random": 0.5}, image_size=32)
    with recordings.EpisodeWriter(
        folder / "imagined",
        image_shape=real.frames.shape[1:],
        instructions=real.instructions,
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
                task=int(real.task[n]),
                source=int(real.source[n]),
            )
    return folder


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
    model = checkpoint.load_model(tmp_path / "out", kind="RewardNet")
    assert model.config.num_instructions == (0 if single else 2)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["scores"]["threshold"] == 0.5
    assert 0 < card["calibration"]["threshold"] < 1
    assert len(card["scores"]["false_success_95"]) == 2


def test_frames_and_chunk_must_fit_together():
    with pytest.raises(SystemExit):
        train_reward.parse(["--data", "a", "--out", "b", "--judged_frames", "1"])
