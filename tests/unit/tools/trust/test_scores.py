import dataclasses

import numpy as np
import pytest

from evac_jax.miniature import scene
from evac_jax.miniature.render import BLOCK_COLORS, FINGER_HALF, PALM_HALF, project, render
from evac_jax.tools.trust import scores


def test_similarity_is_one_for_equal_pictures_and_falls_with_noise():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 24, 30, 3), dtype=np.uint8)
    noisy = np.clip(picture + rng.normal(0, 40, picture.shape), 0, 255).astype(np.uint8)

    assert scores.ssim(picture, picture)[0] == pytest.approx(1, abs=1e-4)
    assert scores.ssim(picture, noisy)[0] < 0.95


def test_similarity_is_that_of_the_formula_when_pictures_are_flat():
    # Without variance only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    one, other = (np.full((16, 16, 3), value, np.uint8) for value in (100, 150))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert scores.ssim(one, other) == pytest.approx(expected, abs=1e-3)


def test_blocks_are_found_where_the_camera_sees_them():
    scenes = scene.sample_scenes(np.arange(40))
    found = scores.locate(render(scenes), BLOCK_COLORS)
    rows = np.arange(40)
    for block in (0, 1):
        seen = found[rows, scenes.colors[:, block]]
        true = project(scenes.blocks[:, block], 64) - 0.5  # pixel centres lie at + 0.5
        away = np.linalg.norm(seen - true, axis=-1)
        hidden = np.isnan(away)
        assert hidden.mean() < 0.1  # behind the gripper
        assert np.nanmedian(away) < 1.0
    gone = dataclasses.replace(scenes, blocks=scenes.blocks + (9, 0, 0))
    assert np.isnan(scores.locate(render(gone), BLOCK_COLORS)[:, :2]).all()
    palm = scenes.position + (0, 0, 2 * FINGER_HALF[2] + PALM_HALF[2])
    assert np.linalg.norm(found[:, -1] - project(palm, 64) + 0.5, axis=-1).max() < 1.5


def test_lost_block_counts_when_only_the_truth_shows_it():
    real = render(scene.sample_scenes(np.array([3])))[None]  # [1 1 64 64 3]
    records = scores.Records.empty(1, 1, 3)
    grey = np.full_like(real, 128)
    scores.compare(records, (np.array([0]), np.array([0])), grey, real, BLOCK_COLORS)

    lost = records.thing_lost[0, 0]
    assert sorted(lost[~np.isnan(lost)]) == [1, 1, 1]  # two blocks, the gripper
    assert np.isnan(records.thing_px[0, 0]).all()


def test_verdicts_have_their_own_denominators_when_counted():
    imagined = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    real = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)

    shares = scores.verdicts(imagined, real)

    assert {name: (s["hits"], s["of"]) for name, s in shares.items()} == {
        "imagined_success": (3, 10),
        "real_success": (3, 10),
        "agreement": (6, 10),
        "false_success": (2, 3),
        "missed_success": (2, 3),
    }
    low, high = shares["agreement"]["interval_95"]
    assert low < 0.6 < high


def test_false_share_has_no_rate_when_nothing_succeeded():
    none = np.zeros(4, bool)
    assert scores.verdicts(none, none)["false_success"]["rate"] is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0.1, 0.2, 0.9], [10, 20, 30], 1.0),
        ([0.1, 0.2, 0.9], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833),  # ties share rank 2.5
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation_is_known_when_worked_by_hand(one, other, expected):
    assert scores.spearman(one, other) == pytest.approx(expected)


def test_chunks_are_pooled_when_episodes_differ_in_length():
    records = scores.Records.empty(2, 4, 0)
    records.mse[0] = (255**2 / 100, 255**2 / 100, 255**2 / 10, 255**2 / 10)  # 20 and 10 dB
    records.mse[1, :2] = 255**2 / 100
    curves = scores.curves(records, np.ones(2, bool), 2)
    assert curves["psnr"] == pytest.approx([20, 10])
