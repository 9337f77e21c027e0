import numpy as np
import pytest
import torch

from evac_jax.errors import DataError, TrainingError
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.reward import calibration


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


def test_scores_that_say_nothing_are_not_calibrated():
    with pytest.raises(TrainingError, match="a higher score means less success"):
        calibration.platt_scale(np.arange(8.0), np.array([True] * 4 + [False] * 4))
    with pytest.raises(DataError, match="all 8 held-out frames that are judged are successes"):
        calibration.platt_scale(np.arange(8.0), np.ones(8, bool))


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
