"""Cameras of the world model's views: matrices in OpenCV's convention, one per view."""

import reprlib

import numpy as np

from evac_jax.errors import ConfigError

Matrices = tuple[np.ndarray, np.ndarray]  # intrinsic [V 3 3] and camera-to-world [V 4 4], float32


def libero_camera() -> Matrices:
    """Return the reference's fixed camera: intrinsic [1 3 3] and camera-to-world [1 4 4].

    Focal length and centre are those of a 128-pixel image although frames have 256; the public
    weights were trained with them.

    Source: RLinf `EvacEnv` (revision c9f1d8471).
    """
    quaternion = np.array([0.0, -0.43318870663642883, 0.0, 0.901303231716156])
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    c2w = np.eye(4)
    c2w[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    c2w[:3, 3] = [0.3, 0.0, 0.6]
    intrinsic = np.array([[64.0, 0, 64.0], [0, 64.0, 64.0], [0, 0, 1]])
    return intrinsic[None].astype(np.float32), c2w[None].astype(np.float32)


def resolve_camera(camera: str | dict | None, known: Matrices | None, n_view: int) -> Matrices:
    """Return intrinsic [V 3 3] and camera-to-world [V 4 4] float32 as configured.

    Args:
        camera: the setting, see `WorldModelEnvConfig.camera`.
        known: what the source of initial states knows, or None.
        n_view: views of the world model, V.

    Raises:
        ConfigError: if there is no camera, not one per view, or matrices that are no camera's.
    """
    if camera == "libero":
        camera = dict(zip(("intrinsic", "c2w"), libero_camera(), strict=True))
    elif camera is None and known is not None:
        camera = {"intrinsic": known[0], "c2w": known[1]}
    if not isinstance(camera, dict) or camera.keys() != {"intrinsic", "c2w"}:
        raise ConfigError(
            'camera: expected "libero" or {"intrinsic": .., "c2w": ..} because the initial states '
            f"do not know theirs, got {reprlib.repr(camera)}"
        )
    matrices = []
    for name, size in (("intrinsic", 3), ("c2w", 4)):
        try:
            matrix = np.array(camera[name], np.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"camera.{name}: expected a matrix of numbers ({error})") from error
        matrix = matrix if matrix.ndim == 3 else matrix[None]
        if matrix.shape != (n_view, size, size):
            raise ConfigError(
                f"camera.{name}: expected {[n_view, size, size]} (one per view), "
                f"got {list(np.shape(camera[name]))}"
            )
        matrices.append(matrix)
    if problems := _problems(*matrices):
        raise ConfigError("camera: " + "; ".join(problems))
    return matrices[0], matrices[1]


def _problems(intrinsic: np.ndarray, c2w: np.ndarray) -> list[str]:
    """Return what keeps matrices [V 3 3] and [V 4 4] from being cameras."""
    if not (np.isfinite(intrinsic).all() and np.isfinite(c2w).all()):
        return ["expected finite numbers"]
    rotation, problems = c2w[:, :3, :3], []
    focal = intrinsic[:, (0, 1), (0, 1)]
    if not np.allclose(intrinsic[:, 2], (0, 0, 1)) or (focal == 0).any() or (focal[:, 1] < 0).any():
        problems.append(
            "intrinsic: expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels with fy > 0, and "
            f"fx > 0 or, where frames are mirrored, fx < 0; got {intrinsic.tolist()}"
        )
    if not np.allclose(c2w[:, 3], (0, 0, 0, 1), atol=1e-4):
        problems.append(
            f"c2w: expected 0, 0, 0, 1 as the last row, got {c2w[:, 3].tolist()}; is it transposed?"
        )
    elif not np.allclose(rotation @ rotation.swapaxes(1, 2), np.eye(3), atol=0.01) or (
        np.linalg.det(rotation).min() < 0
    ):
        problems.append("c2w: expected a rotation (no scale, no mirror) in its first three rows")
    return problems
