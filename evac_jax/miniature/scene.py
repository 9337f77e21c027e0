"""The tabletop's state and dynamics: N scenes as arrays, stepped together.

A scene has a free gripper, two coloured blocks and a plate. There is no hidden state: a picture and
an action determine the next picture, so a world model can learn the dynamics. NumPy only.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from evac_jax.miniature.tasks import COLORS

ACTION_DIM = 7
POSE_DIM = 8
NOTHING = -1  # `Scenes.held` of an empty gripper
TARGET, DISTRACTOR = 0, 1  # rows of `Scenes.blocks`


@dataclass(frozen=True)
class Tabletop:
    """Sizes and rules, in metres and radians.

    Attributes:
        workspace_low: smallest x, y, z of the gripper tip.
        workspace_high: largest x, y, z.
        max_translation: largest translation of one step along each axis, for an action entry of 1.
        max_rotation: largest rotation of one step about each axis.
        max_opening: largest change of the opening (0 closed .. 1 open) in one step.
        block_size: edge length of the cubes.
        reach: a closed gripper holds a block if its tip is within this distance of the block's
            centre. It is several pixels in a 64-pixel frame, so that frames show what is held.
        closed_below: the gripper grasps if its opening is less than this.
        open_above: the gripper lets go if its opening is greater than this.
        plate_radius: radius of the plate.
        success_radius: the target is on the plate if its centre is within this distance.
        success_clearance: for success the tip must also be farther than this from the target.
        block_area: half extents of the area in which blocks start, x and y.
        plate_area: the same for the plate's centre.
        gripper_area: the same for the tip.
        gripper_start_height: lowest and highest start of the tip.
        plate_gap: smallest distance between a block's start and the plate's centre.
        block_gap: smallest distance between the starts of the blocks.
    """

    workspace_low: tuple[float, float, float] = (-0.15, -0.12, 0.02)
    workspace_high: tuple[float, float, float] = (0.15, 0.12, 0.16)
    max_translation: float = 0.03
    max_rotation: float = 0.1
    max_opening: float = 0.5
    block_size: float = 0.055
    reach: float = 0.04
    closed_below: float = 0.4
    open_above: float = 0.5
    plate_radius: float = 0.06
    success_radius: float = 0.045
    success_clearance: float = 0.055
    block_area: tuple[float, float] = (0.12, 0.09)
    plate_area: tuple[float, float] = (0.10, 0.07)
    gripper_area: tuple[float, float] = (0.07, 0.05)
    gripper_start_height: tuple[float, float] = (0.11, 0.15)
    plate_gap: float = 0.11
    block_gap: float = 0.09


TABLETOP = Tabletop()


@dataclass
class Scenes:
    """N scenes. Functions return new objects and never change the arrays of existing ones.

    Attributes:
        position: gripper tip, metres, [N 3]; x to the right, y away from the camera, z up.
        quaternion: its orientation, xyzw, unit length; identity points straight down, [N 4].
        opening: 0 closed .. 1 open, [N].
        blocks: centres of the target and of the distractor, metres, [N 2 3].
        colors: index into `tasks.COLORS` of each block, int64 [N 2].
        plate: centre, x and y, [N 2].
        held: row of the block in the gripper or `NOTHING`, int64 [N].

    All floats are float64, so that a scene is the same on every machine.
    """

    position: np.ndarray
    quaternion: np.ndarray
    opening: np.ndarray
    blocks: np.ndarray
    colors: np.ndarray
    plate: np.ndarray
    held: np.ndarray

    def __len__(self) -> int:
        return len(self.opening)

    def __getitem__(self, rows) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @property
    def task(self) -> np.ndarray:
        """Index of each scene's instruction, int32 [N]: the colour of its target."""
        return self.colors[:, TARGET].astype(np.int32)

    @property
    def pose(self) -> np.ndarray:
        """The pose for policy and world model: xyz, quaternion xyzw, opening; float32 [N 8]."""
        return np.concatenate(
            (self.position, self.quaternion, self.opening[:, None]), axis=1, dtype=np.float32
        )


def concatenate(parts: list[Scenes]) -> Scenes:
    """Return the scenes of `parts` one after another."""
    names = [field.name for field in dataclasses.fields(Scenes)]
    return Scenes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def where(mask: np.ndarray, yes: Scenes, no: Scenes) -> Scenes:
    """Return scene n of `yes` where `mask` [N] is True, of `no` elsewhere."""

    def pick(name):
        one, other = getattr(yes, name), getattr(no, name)
        return np.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    return Scenes(*(pick(field.name) for field in dataclasses.fields(Scenes)))


def sample_scenes(seeds: np.ndarray, table: Tabletop = TABLETOP) -> Scenes:
    """Return the start scenes of `seeds`, non-negative integers [N].

    A scene depends only on its own seed, so a seed is a start id. Target colour, distractor colour,
    positions and the gripper's start are uniform, subject to the gaps of `table`.
    """
    seeds = np.asarray(seeds, np.int64)
    rows = np.array([_sample_row(int(seed), table) for seed in seeds]).reshape(-1, 11)
    count = len(seeds)
    blocks = np.full((count, 2, 3), table.block_size / 2)
    blocks[:, :, :2] = rows[:, 4:8].reshape(count, 2, 2)
    return Scenes(
        position=rows[:, 8:11].copy(),
        quaternion=np.tile((0.0, 0.0, 0.0, 1.0), (count, 1)),
        opening=np.ones(count),
        blocks=blocks,
        colors=rows[:, :2].astype(np.int64),
        plate=rows[:, 2:4].copy(),
        held=np.full(count, NOTHING),
    )


def _sample_row(seed: int, table: Tabletop) -> list[float]:
    """Return colours 2, plate 2, blocks 2 x 2 and gripper tip 3 of one scene."""
    rng = np.random.default_rng(seed)
    target = int(rng.integers(len(COLORS)))
    distractor = (target + int(rng.integers(1, len(COLORS)))) % len(COLORS)
    # Plain floats: for six numbers they are several times faster than arrays.
    scales = table.plate_area + table.block_area * 2
    while True:
        draw = rng.random(6).tolist()
        spots = [(2 * u - 1) * scale for u, scale in zip(draw, scales, strict=True)]
        plate, first, second = spots[:2], spots[2:4], spots[4:]
        if (
            math.dist(first, plate) > table.plate_gap
            and math.dist(second, plate) > table.plate_gap
            and math.dist(first, second) > table.block_gap
        ):
            break
    u, v, w = rng.random(3).tolist()
    low, high = table.gripper_start_height
    tip = [(2 * u - 1) * table.gripper_area[0], (2 * v - 1) * table.gripper_area[1]]
    return [target, distractor, *spots, *tip, low + w * (high - low)]


def step(scenes: Scenes, actions: np.ndarray, table: Tabletop = TABLETOP) -> Scenes:
    """Return the scenes one action later.

    Whether a block is held depends on the state only. A closed gripper near a block's centre holds
    the block, with its centre at the tip. A gripper that is open beyond `open_above` holds nothing,
    and the block drops straight down at once. Blocks do not collide.

    Args:
        actions: [N 7], clipped to [-1, 1]: translation in world axes, rotation vector in world
            axes, and the gripper as in LIBERO: -1 opens, +1 closes.
    """
    actions = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
    position = np.clip(
        scenes.position + table.max_translation * actions[:, :3],
        table.workspace_low,
        table.workspace_high,
    )
    quaternion = rotate(scenes.quaternion, table.max_rotation * actions[:, 3:6])
    opening = np.clip(scenes.opening - table.max_opening * actions[:, 6], 0.0, 1.0)

    rest = table.block_size / 2
    blocks, held = scenes.blocks.copy(), scenes.held.copy()
    released = np.flatnonzero((held != NOTHING) & (opening > table.open_above))
    blocks[released, held[released], 2] = rest
    held[released] = NOTHING

    distance = np.linalg.norm(blocks - position[:, None], axis=-1)  # [N 2]
    nearest = distance.argmin(1)
    grasped = (held == NOTHING) & (opening < table.closed_below) & (distance.min(1) <= table.reach)
    held = np.where(grasped, nearest, held)
    carrying = np.flatnonzero(held != NOTHING)
    blocks[carrying, held[carrying]] = position[carrying]
    blocks[..., 2] = np.maximum(blocks[..., 2], rest)  # a held block cannot enter the table
    return Scenes(position, quaternion, opening, blocks, scenes.colors, scenes.plate, held)


def is_success(scenes: Scenes, table: Tabletop = TABLETOP) -> np.ndarray:
    """Return whether the task is done, bool [N]; one picture shows it.

    The target is on the plate, and the gripper is open and has moved away from it.
    """
    target = scenes.blocks[:, TARGET]
    on_plate = np.linalg.norm(target[:, :2] - scenes.plate, axis=1) < table.success_radius
    away = np.linalg.norm(target - scenes.position, axis=1) > table.success_clearance
    return on_plate & away & (scenes.opening > table.open_above)


def rotate(quaternion: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Return orientations xyzw [N 4] turned by rotation vectors in world axes, radians [N 3]."""
    angle = np.linalg.norm(rotation, axis=1, keepdims=True)
    xyz = 0.5 * np.sinc(angle / (2 * np.pi)) * rotation  # sin(angle / 2) * axis, also at 0
    w = np.cos(angle / 2)
    old_xyz, old_w = quaternion[:, :3], quaternion[:, 3:]
    turned = np.concatenate(
        (
            w * old_xyz + old_w * xyz + np.cross(xyz, old_xyz),
            w * old_w - (xyz * old_xyz).sum(1, keepdims=True),
        ),
        axis=1,
    )
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


def rotation_matrices(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation matrices [N 3 3] of unit quaternions xyzw [N 4]."""
    x, y, z, w = quaternion.T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)
