"""Where the hand, and the things whose places a recording tells, are in its pictures."""

import numpy as np

from evac_jax.files.recordings import Episodes

REACH = 0.08  # half the side of the square round a place, as a share of the picture's width


def project(points: np.ndarray, intrinsic: np.ndarray, c2w: np.ndarray) -> np.ndarray:
    """Return where points are seen, pixels (x, y) [N K 2]; NaN behind the camera or where unknown.

    Args:
        points: metres in the world [N K 3], NaN where unknown.
        intrinsic, c2w: of the camera of each picture, [N 3 3] and [N 4 4].
    """
    w2c = np.linalg.inv(np.asarray(c2w, np.float64))
    seen = np.einsum("nij,nkj->nki", w2c[:, :3, :3], points) + w2c[:, None, :3, 3]
    seen = np.where(seen[..., 2:] > 0, seen, np.nan)
    image = np.einsum("nij,nkj->nki", np.asarray(intrinsic, np.float64), seen)
    return image[..., :2] / image[..., 2:]


def places(data: Episodes, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Return where hand and things are in frames `rows` [N] of `views` [N], pixels [N 1+K 2].

    The hand comes first, which every recording tells, then the K things of `data.objects`.
    """
    points = np.concatenate((data.poses[rows, None, :3], data.objects[rows]), axis=1)
    return project(points, data.intrinsic[views], data.c2w[views])


def squares(places: np.ndarray, size: tuple[int, int], reach: float = REACH) -> np.ndarray:
    """Return which pixels lie in a square round any of the places, bool [N H W].

    Args:
        places: [N K 2] pixels (x, y), NaN where unknown.
        size: height and width of the pictures.
        reach: half the side of a square, as a share of the width.
    """
    height, width = size
    half = reach * width
    near_x = np.abs(places[:, :, :1] - (np.arange(width) + 0.5)) <= half  # [N K W]
    near_y = np.abs(places[:, :, 1:] - (np.arange(height) + 0.5)) <= half
    return (near_y[..., :, None] & near_x[..., None, :]).any(1)
