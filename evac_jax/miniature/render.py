"""Pictures of the tabletop: a windowed NumPy ray caster, batched over scenes.

Each box, disc and shadow tests only the pixels in a window around its projection. A colour is one
byte per sample (an index into `_PALETTE`). At the end 2 x 2 samples are averaged to a pixel. The
soft edges show positions with a precision finer than a pixel.
"""

import functools

import numpy as np

from evac_jax.miniature.scene import TABLETOP, Scenes, Tabletop, rotation_matrices

EYE = (0.0, -0.42, 0.60)
LOOK_AT = (0.0, 0.0, 0.055)
FIELD_OF_VIEW = np.deg2rad(35.0)
SAMPLES = 2  # per pixel and axis
_BATCH = 32  # scenes drawn at once; larger arrays do not fit into the processor's cache

# Metres, in the gripper's own frame with the tip at the origin.
FINGER_HALF = (0.006, 0.009, 0.025)
FINGER_TRAVEL = 0.034  # distance of each finger's middle from the tip when fully open
FINGER_CLOSED = 0.006
PALM_HALF = (0.042, 0.012, 0.012)
GRIPPER_SHADOW = 0.02  # radius
PLATE_INNER = 0.82  # radius of the white inside, as a share
TABLE_HALF = (0.20, 0.17)

# One row per kind of surface: table, floor, plate, rim, palm, finger, red, blue.
_COLORS = np.array(
    [
        (176, 164, 148), (92, 98, 108), (244, 244, 240), (196, 200, 206), (48, 48, 56),
        (64, 168, 96), (208, 44, 40), (40, 84, 208),
    ]
)  # fmt: skip
_TABLE, _FLOOR, _PLATE, _RIM, _PALM, _FINGER, _BLOCK = range(7)
BLOCK_COLORS = _COLORS[_BLOCK:]  # as `Scenes.colors` counts them, before shading, [2 3] in 0..255
_SHADES = (0.72, 0.86, 1.0, 0.5)  # side faces, front and back faces, top, in shadow
_FLAT, _SHADOWED = 2, 3  # rows of _SHADES for surfaces that lie on the table
_SURFACES = len(_COLORS)
# Three channels in one integer, ten bits each, so that the sum of four samples does not overflow.
_RGB = np.rint(np.concatenate([_COLORS * shade for shade in _SHADES])).astype(np.uint32)
_PALETTE = (_RGB[:, 0] << 20) | (_RGB[:, 1] << 10) | _RGB[:, 2]


@functools.cache
def camera(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return intrinsics [3 3] and camera-to-world [4 4], float32, read-only.

    OpenCV's convention: x right, y down, z forward. The centre of pixel (row i, column j) is at
    (j + 0.5, i + 0.5), so `floor` of a projected point is its pixel. EVAC's ray maps and
    trajectory maps use the same convention.

    Args:
        image_size: height and width in pixels.
    """
    focal = image_size / 2 / np.tan(FIELD_OF_VIEW / 2)
    intrinsic = np.array(
        ((focal, 0, image_size / 2), (0, focal, image_size / 2), (0, 0, 1)), np.float32
    )
    eye = np.array(EYE)
    forward = np.array(LOOK_AT) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1.0))
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack((right, np.cross(forward, right), forward, eye), axis=1)
    c2w = c2w.astype(np.float32)
    intrinsic.flags.writeable = c2w.flags.writeable = False
    return intrinsic, c2w


def project(points: np.ndarray, image_size: int) -> np.ndarray:
    """Return pixel coordinates (column, row) [.. 2] of world points [.. 3]."""
    intrinsic, c2w = camera(image_size)
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    return local[..., :2] / local[..., 2:] * intrinsic[0, 0] + intrinsic[:2, 2]


def render(scenes: Scenes, image_size: int = 64, table: Tabletop = TABLETOP) -> np.ndarray:
    """Return uint8 RGB pictures [N H W 3] of the scenes."""
    pictures = np.empty((len(scenes), image_size, image_size, 3), np.uint8)
    for first in range(0, len(scenes), _BATCH):
        rows = slice(first, first + _BATCH)
        pictures[rows] = _render(scenes[rows], image_size, table)
    return pictures


def _render(scenes: Scenes, image_size: int, table: Tabletop) -> np.ndarray:
    canvas = _Canvas(len(scenes), image_size)
    canvas.plate(scenes.plate, table.plate_radius)
    half = table.block_size / 2
    for block in (0, 1):
        canvas.shadow(scenes.blocks[:, block, :2], 1.1 * half, square=True)
    canvas.shadow(scenes.position[:, :2], GRIPPER_SHADOW, square=False)

    upright = np.broadcast_to(np.eye(3), (len(scenes), 3, 3))
    for block in (0, 1):
        color = _BLOCK + scenes.colors[:, block]
        canvas.box(scenes.blocks[:, block], (half, half, half), upright, color)

    turn = rotation_matrices(scenes.quaternion)
    right, up = turn[:, :, 0], turn[:, :, 2]
    spread = FINGER_CLOSED + (FINGER_TRAVEL - FINGER_CLOSED) * scenes.opening[:, None]
    for side in (-1, 1):
        finger = scenes.position + FINGER_HALF[2] * up + side * spread * right
        canvas.box(finger, FINGER_HALF, turn, _FINGER)
    palm = scenes.position + (2 * FINGER_HALF[2] + PALM_HALF[2]) * up
    canvas.box(palm, PALM_HALF, turn, _PALM)
    return canvas.pictures()


@functools.cache
def _background(samples: int) -> np.ndarray:
    """Palette index of every sample of an empty scene, uint8 [S S]."""
    intrinsic, c2w = camera(samples)
    grid = (np.arange(samples) + 0.5 - samples / 2) / intrinsic[0, 0]
    x, y, z = (c2w[i, 0] * grid[None, :] + c2w[i, 1] * grid[:, None] + c2w[i, 2] for i in range(3))
    depth = -EYE[2] / z
    on_table = (np.abs(EYE[0] + depth * x) < TABLE_HALF[0]) & (
        np.abs(EYE[1] + depth * y) < TABLE_HALF[1]
    )
    return (_FLAT * _SURFACES + np.where(on_table, _TABLE, _FLOOR)).astype(np.uint8)


class _Canvas:
    """Palette indices and depths of N pictures while they are drawn."""

    def __init__(self, count: int, image_size: int):
        self._count, self._size = count, image_size * SAMPLES
        shape = (count, self._size, self._size)
        self._index = np.broadcast_to(_background(self._size), shape).copy()
        self._depth = np.full(shape, np.inf, np.float32)
        self._intrinsic, self._c2w = camera(self._size)

    def _window(self, center: np.ndarray, radius: float):
        """Samples that may see an object inside spheres with centres [N 3].

        Returns their columns and rows, int64 [N w], which may be outside the picture, and the
        same as coordinates on the camera's image plane at depth 1, float32 [N w].
        """
        local = (center - self._c2w[:3, 3]) @ self._c2w[:3, :3]
        focal = float(self._intrinsic[0, 0])
        # The outline of a sphere is a little larger than radius / depth; 10 % covers it.
        reach = int(np.ceil(1.1 * focal * radius / local[:, 2].min())) + 1
        offsets = np.arange(-reach, reach + 1)
        uv = local[:, :2] / local[:, 2:] * focal + self._size / 2
        columns, rows = (np.floor(uv[:, i]).astype(np.int64)[:, None] + offsets for i in (0, 1))
        u, v = (
            ((cells + 0.5 - self._size / 2) / focal).astype(np.float32) for cells in (columns, rows)
        )
        return columns, rows, u, v

    def box(self, center: np.ndarray, half, turn: np.ndarray, surface) -> None:
        """Draw boxes with half extents [3] along the axes `turn` [N 3 3], centres [N 3]."""
        columns, rows, u, v = self._window(center, float(np.linalg.norm(half)))
        camera_axes = (np.swapaxes(turn, 1, 2) @ self._c2w[:3, :3]).astype(np.float32)
        eye = np.einsum("nij,ni->nj", turn, EYE - center).astype(np.float32)
        enters, leaves = [], []
        for axis in range(3):
            a, b, c = (camera_axes[:, axis, i, None] for i in range(3))
            # Separable: the direction of a ray is the sum of a column term and a row term.
            with np.errstate(divide="ignore"):
                inverse = 1 / ((a * u)[:, None, :] + (b * v + c)[:, :, None])
            # A ray is between the two faces of this axis from middle - span to middle + span.
            middle = -eye[:, axis, None, None] * inverse
            span = np.abs(np.float32(half[axis]) * inverse)
            enters.append(middle - span)
            leaves.append(middle + span)
        enter = np.maximum(np.maximum(enters[0], enters[1]), enters[2])
        leave = np.minimum(np.minimum(leaves[0], leaves[1]), leaves[2])
        scene, row, column = np.nonzero(enter < leave)
        x, y = columns[scene, column], rows[scene, row]
        inside = (x >= 0) & (x < self._size) & (y >= 0) & (y < self._size)
        scene, row, column, x, y = (array[inside] for array in (scene, row, column, x, y))

        depth = enter[scene, row, column]
        flat = (scene * self._size + y) * self._size + x
        depths = self._depth.reshape(-1)
        nearer = depth < depths[flat]
        scene, row, column, flat, depth = (
            array[nearer] for array in (scene, row, column, flat, depth)
        )
        depths[flat] = depth
        on_y = enters[1][scene, row, column] == depth
        on_z = enters[2][scene, row, column] == depth
        shade = np.where(on_z, 2, on_y.astype(np.int64))
        surface = np.broadcast_to(surface, self._count)[scene]
        self._index.reshape(-1)[flat] = shade * _SURFACES + surface

    def _around(self, center: np.ndarray, radius: float):
        """Offsets [N w w] from `center` [N 2] of the table points around it, and their samples."""
        point = np.concatenate((center, np.zeros((self._count, 1))), axis=1)
        columns, rows, u, v = self._window(point, radius)
        axes = self._c2w[:3, :3]
        x, y, z = (
            (axes[i, 0] * u)[:, None, :] + (axes[i, 1] * v + axes[i, 2])[:, :, None]
            for i in range(3)
        )
        away = np.float32(-EYE[2]) / z
        offset_x, offset_y = (
            (EYE[i] - center[:, i]).astype(np.float32)[:, None, None] + away * direction
            for i, direction in enumerate((x, y))
        )
        rows, columns = rows[:, :, None], columns[:, None, :]
        inside = (rows >= 0) & (rows < self._size) & (columns >= 0) & (columns < self._size)
        flat = (np.arange(self._count)[:, None, None] * self._size + rows) * self._size + columns
        return offset_x, offset_y, inside, flat

    def plate(self, center: np.ndarray, radius: float) -> None:
        """Draw a plate with a rim at each centre [N 2]."""
        x, y, inside, flat = self._around(center, radius)
        distance = x * x + y * y
        seen = inside & (distance < radius**2)
        surface = np.where(distance[seen] < (PLATE_INNER * radius) ** 2, _PLATE, _RIM)
        self._index.reshape(-1)[flat[seen]] = _FLAT * _SURFACES + surface

    def shadow(self, center: np.ndarray, half: float, *, square: bool) -> None:
        """Darken the table below an object lit from straight above."""
        x, y, inside, flat = self._around(center, half * (np.sqrt(2) if square else 1))
        shape = np.maximum(np.abs(x), np.abs(y)) < half if square else x * x + y * y < half**2
        flat = flat[inside & shape]
        index = self._index.reshape(-1)
        index[flat] = index[flat] % _SURFACES + _SHADOWED * _SURFACES

    def pictures(self) -> np.ndarray:
        """Return the averaged samples, uint8 [N H W 3]."""
        packed = _PALETTE[self._index]
        packed = packed[:, ::2] + packed[:, 1::2]
        total = packed[:, :, ::2] + packed[:, :, 1::2]
        result = np.empty((*total.shape, 3), np.uint8)
        for channel, shift in enumerate((22, 12, 2)):  # the 2 divides by the four samples
            result[..., channel] = total >> shift
        return result
