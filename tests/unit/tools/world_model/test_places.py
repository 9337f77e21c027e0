import numpy as np

from evac_jax.files import recordings
from evac_jax.tools.world_model.places import places, project, squares
from tests.unit.tools import tiny_recording

# 100 pixels of focal length, middle at (32, 32), one metre above the origin, looking down.
INTRINSIC = np.array([[[100.0, 0, 32], [0, 100, 32], [0, 0, 1]]])
ABOVE = np.array([[[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]])


def test_points_are_projected_and_unseen_ones_are_nowhere():
    points = np.array([[[0.1, 0.05, 0.0], [0.0, 0.0, 0.5], [0, 0, 2.0], [np.nan] * 3]])
    found = project(points, INTRINSIC, ABOVE)
    np.testing.assert_allclose(found[0, :2], [[42, 27], [32, 32]], atol=1e-9)
    assert np.isnan(found[0, 2:]).all()  # behind the camera; unknown


def test_mirrored_camera_shows_the_point_on_the_other_side():
    mirrored = INTRINSIC * [[-1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert project(np.array([[[0.1, 0.0, 0.0]]]), mirrored, ABOVE)[0, 0, 0] == 22


def test_squares_lie_round_every_known_place_and_nowhere_else():
    found = squares(np.array([[[10.0, 20.0], [np.nan, np.nan]]]), (64, 64), reach=2 / 64)
    assert found.sum() == 16
    assert found[0, 18:22, 8:12].all()
    two = squares(np.array([[[10.0, 20.0], [40.0, 20.0]]]), (64, 64), reach=2 / 64)
    assert two.sum() == 32
    assert not squares(np.full((1, 3, 2), np.nan), (64, 64)).any()


def test_hand_is_a_place_of_every_recording_and_known_things_follow_it(tmp_path):
    data = recordings.load(tiny_recording.write(tmp_path / "data", views=2))
    rows, views = np.array([0, 5]), np.array([1, 0])
    data.objects[5, 1] = data.poses[5, :3] + [0.1, 0, 0]
    alone = places(data, rows, views)
    assert alone.shape == (2, 4, 2)
    assert np.isnan(alone[0, 1:]).all()
    assert np.isnan(alone[1, [1, 3]]).all()
    x, _, z = data.poses[5, :3]
    np.testing.assert_allclose(alone[1, 0, 0], 16 + 30 * x / (z + 1), rtol=1e-5)
    np.testing.assert_allclose(alone[1, 2, 0], 16 + 30 * (x + 0.1) / (z + 1), rtol=1e-5)
