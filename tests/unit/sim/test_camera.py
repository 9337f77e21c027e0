import numpy as np
import pytest

from evac_jax.errors import ConfigError
from evac_jax.miniature import render
from evac_jax.sim.camera import libero_camera, resolve_camera
from evac_jax.sim.libero_tasks import camera_matrices

K = [[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]


def test_known_cameras_are_cameras():
    resolve_camera("libero", None, 1)
    resolve_camera(None, libero_camera(), 1)
    resolve_camera(dict(zip(("intrinsic", "c2w"), render.camera(64), strict=True)), None, 1)
    # LIBERO's frames are mirrored, and so are its cameras.
    mirrored = camera_matrices(45.0, [1, 0, 1], [0, 0, 1, 1, 0, 0, 0, 1, 0], 64)
    intrinsic, _ = resolve_camera(None, mirrored, 1)
    assert intrinsic[0, 0, 0] < 0 < intrinsic[0, 1, 1]


@pytest.mark.parametrize(
    ("intrinsic", "c2w", "told"),
    [
        (K, np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 2, 3, 1]]), "transposed"),
        (K, np.diag([1, 1, -1, 1]), "a rotation"),
        (K, np.diag([2, 2, 2, 1]), "a rotation"),
        (np.transpose(K), np.eye(4), "intrinsic: expected"),
        ([[64.0, 0, 32], [0, -64, 32], [0, 0, 1]], np.eye(4), "fy > 0"),
        (K, np.full((4, 4), np.nan), "finite numbers"),
        ([[1, 2], [3]], np.eye(4), "camera.intrinsic: expected a matrix of numbers"),
    ],
)
def test_matrices_that_are_no_camera_are_refused(intrinsic, c2w, told):
    with pytest.raises(ConfigError, match=told):
        resolve_camera({"intrinsic": intrinsic, "c2w": c2w}, None, 1)


def test_setting_that_is_no_camera_is_not_printed_whole():
    with pytest.raises(ConfigError) as told:
        resolve_camera({name * 40: [0] * 999 for name in "abcdefgh"}, None, 1)
    assert len(str(told.value)) < 500
