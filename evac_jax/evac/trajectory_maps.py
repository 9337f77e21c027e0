"""Trajectory maps: pictures that show where the gripper will be in the camera image.

Each future pose becomes one picture on a grey canvas: a disc at the end effector, coloured by the
gripper opening, and three lines along its axes. The whole batch is drawn on its device.

There are two public conventions: `renderer="upstream"` (AgibotTech/EnerVerse-AC: both arms, camera
along +Z) and `renderer="fork"` (jzndd/EnerVerse-AC, used for RLinf's weights: only the left pose,
camera along -Z, pixels mirrored in both axes).

Source: specification of the public repositories' `get_traj`; drawing in `raster.py`.
"""

import numpy as np
import torch
from torch import Tensor

from evac_jax.evac import raster
from evac_jax.evac.config import MapConfig

CANVAS = 50  # grey level of an empty map, all channels
# RGB of the x, y and z axes.
LEFT_AXES = ((0, 0, 255), (255, 255, 0), (0, 255, 255))
RIGHT_AXES = ((255, 0, 255), (255, 0, 0), (0, 255, 0))
# ColorBrewer's nine-step sequential maps, the anchors of matplotlib's "Greens" and "Reds".
# matplotlib stores the last blue of "Reds" as a decimal just below 13 / 255; it truncates to 12.
GREENS = (
    (247, 252, 245), (229, 245, 224), (199, 233, 192), (161, 217, 155), (116, 196, 118),
    (65, 171, 93), (35, 139, 69), (0, 109, 44), (0, 68, 27),
)  # fmt: skip
REDS = (
    (255, 245, 240), (254, 224, 210), (252, 187, 161), (252, 146, 114), (251, 106, 74),
    (239, 59, 44), (203, 24, 29), (165, 15, 21), (103, 0, 12.9999999999),
)  # fmt: skip
# End effector to camera. The fork draws a second view as seen from a camera fixed to the hand.
WRIST_CAMERA = (
    (1.0, 0.0, 0.0, 0.046498),
    (0.0, 0.0, 1.0, 0.067399),
    (0.0, 1.0, 0.0, 0.020001),
    (0.0, 0.0, 0.0, 1.0),
)
MIN_DEPTH = 1e-6  # metres; the smallest depth in the fork, for points behind the camera


def color_table(anchors: tuple[tuple[float, float, float], ...], device=None) -> Tensor:
    """[256, 3] uint8 rows of a colour map, truncated as the renderer truncates them."""
    # NumPy and this order of operations, because truncation depends on the last bit.
    knots = np.array(anchors) / 255
    knot_at = np.linspace(0, 1, len(anchors)) * 255
    row_at = 255 * np.linspace(0, 1, 256)[1:-1]
    upper = np.searchsorted(knot_at, row_at)
    lower = upper - 1
    share = (row_at - knot_at[lower]) / (knot_at[upper] - knot_at[lower])
    middle = share[:, None] * (knots[upper] - knots[lower]) + knots[lower]
    rows = np.concatenate((knots[:1], middle, knots[-1:]))
    return torch.from_numpy((rows * 255).astype(np.uint8)).to(device)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] (x, y, z, w) of any length > 0."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2.0 / quaternion.square().sum(-1)
    rows = (
        1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def pose_to_matrix(pose: Tensor) -> Tensor:
    """Homogeneous matrices [..., 4, 4] of poses [..., >=7]: x y z (metres), quaternion xyzw."""
    matrix = torch.zeros(*pose.shape[:-1], 4, 4, dtype=pose.dtype, device=pose.device)
    matrix[..., :3, :3] = quaternion_to_matrix(pose[..., 3:7])
    matrix[..., :3, 3] = pose[..., :3]
    matrix[..., 3, 3] = 1.0
    return matrix


def project(pose: Tensor, intrinsic: Tensor, w2c: Tensor, config: MapConfig, size) -> Tensor:
    """Pixel coordinates of one arm's base point and axis ends.

    Args:
        pose: [B, T, 8] one arm (xyz, quaternion xyzw, gripper).
        intrinsic: [B or 1, V, 3, 3] pixels of the image of `size`.
        w2c: [B or 1, V, T or 1, 4, 4] world to camera.
        config: renderer conventions.
        size: (height, width) of the image.

    Returns:
        [B, V, T, 4, 2] float64 (column, row), not rounded.
    """
    height, width = size
    # The references multiply matrices in float32 and points in float64. Another order of rounding
    # would change pixels, because coordinates are truncated.
    hand = (w2c.float() @ pose_to_matrix(pose.float())[:, None]).double()  # [B V T 4 4]
    upstream = config.renderer == "upstream"
    if not upstream and config.wrist_view and w2c.shape[1] > 1:
        hand[:, 1] = torch.tensor(WRIST_CAMERA, dtype=hand.dtype, device=hand.device)
    shift = config.tool_offset if upstream else 0.0
    points = torch.zeros(4, 4, dtype=hand.dtype, device=hand.device)  # columns: base, x, y, z
    points[:3, 1:] = config.axis_length * torch.eye(3)
    points[2] += shift
    points[3] = 1.0
    x, y, z, _ = (hand @ points).unbind(-2)  # [B V T 4]
    k = intrinsic.double()[:, :, None]
    if upstream:
        pixels = k @ torch.stack((x, y, z), -2)
        return (pixels[..., :2, :] / pixels[..., 2:, :]).mT
    depth = (-z).clamp(min=MIN_DEPTH)
    u = x / depth * k[..., 0, 0, None] + k[..., 0, 2, None]
    v = y / depth * k[..., 1, 1, None] + k[..., 1, 2, None]
    return torch.stack((width - 1 - u, height - 1 - v), -1)


def gripper_rows(gripper: Tensor, config: MapConfig) -> Tensor:
    """Colour-table rows 0..255 of gripper readings, in the renderer's own range."""
    low, high = config.gripper_range
    value = (gripper.double() - low) / (high - low)
    return (value * 256).floor().clamp(0, 255).nan_to_num(0.0).long()


def draw_maps(
    pose: Tensor, intrinsic: Tensor, w2c: Tensor, config: MapConfig, size: tuple[int, int]
) -> Tensor:
    """Trajectory maps of a batch of pose windows.

    Args:
        pose: [B, T, 16] left arm then right arm, each xyz (metres), quaternion xyzw, gripper.
        intrinsic: [B or 1, V, 3, 3] pixels of the image of `size`.
        w2c: [B or 1, V, T or 1, 4, 4] world to camera.
        config: renderer, sizes and colours.
        size: (height, width) pixels.

    Returns:
        [B, V, T, 3, height, width] uint8 RGB.
    """
    fork = config.renderer == "fork"
    # The fork projects the left pose for both arms. The right arm is drawn last, with its own
    # colours, so it hides the left one completely.
    arms = ((0, 15, REDS, RIGHT_AXES),) if fork else (
        (0, 7, GREENS, LEFT_AXES), (8, 15, REDS, RIGHT_AXES),
    )[: config.arms]  # fmt: skip
    if not fork and config.tool_yaw:
        pose = tool_yaw(pose, config.tool_yaw)
    discs, lines, palettes = [], [], []
    for first, gripper, anchors, axes in arms:
        uv = project(pose[..., first : first + 8], intrinsic, w2c, config, size)
        lead = uv.shape[:3]
        disc, strokes = _arm_masks(raster.to_pixels(uv).flatten(0, 2), config, size)
        discs.append(disc)
        lines.extend(strokes)
        rows = gripper_rows(pose[..., gripper], config)[:, None].expand(lead).flatten()
        palettes.append((color_table(anchors, pose.device)[rows], axes))
    return _paint(discs, lines, palettes, size).unflatten(0, lead)


def _arm_masks(points: Tensor, config: MapConfig, size) -> tuple[Tensor, list[Tensor]]:
    """Masks [N, H, W] of the disc and the three axes of points [N, 4, 2]."""
    height, width = size
    limit = torch.tensor((width, height), device=points.device)
    base = points[:, 0]
    inside = ((base >= 0) & (base < limit)).all(1)
    # An arm whose base is outside is not drawn: move it to where no disc and no line is visible.
    away = torch.full_like(points, raster.LIMIT)
    points = torch.where(inside[:, None, None], points, away)
    disc = raster.covers(raster.circle(points[:, 0], config.radius, height), width)
    strokes = [
        raster.covers(
            raster.line(points[:, 0], points[:, axis], config.thickness, height, width), width
        )
        for axis in (1, 2, 3)
    ]
    return disc, strokes


def _paint(discs, lines, palettes, size) -> Tensor:
    """[N, 3, H, W] uint8: discs first, then lines; each hides what is below it."""
    count, device = discs[0].shape[0], discs[0].device
    label = torch.zeros(count, *size, dtype=torch.uint8, device=device)
    for number, mask in enumerate((*discs, *lines), start=1):
        label.masked_fill_(mask, number)
    fixed = torch.tensor(
        [color for _, axes in palettes for color in axes], dtype=torch.uint8, device=device
    )
    palette = torch.cat(
        (
            torch.full((count, 1, 3), CANVAS, dtype=torch.uint8, device=device),
            torch.stack([disc for disc, _ in palettes], 1),
            fixed.expand(count, -1, 3),
        ),
        1,
    )  # [N labels 3]
    index = label.flatten(1).long()[:, None].expand(-1, 3, -1)
    return palette.mT.gather(2, index).unflatten(2, size)


def normalize_maps(maps: Tensor) -> Tensor:
    """uint8 maps as the autoencoder sees them, float32 in [-1, 1]."""
    return (maps.float() / 255 - 0.5) / 0.5


def tool_yaw(pose: Tensor, angle: float) -> Tensor:
    """Poses [..., 16] as upstream draws them: turned about their own z axis.

    Args:
        pose: left arm then right arm.
        angle: radians; the left arm turns by -angle, the right one by +angle.

    Returns:
        [..., 16] with unit quaternions.
    """
    half = torch.tensor((-angle / 2, angle / 2), dtype=torch.float64, device=pose.device)
    sin, cos = half.sin(), half.cos()
    arms = pose.double().unflatten(-1, (2, 8))
    x, y, z, w = (arms[..., 3:7] / arms[..., 3:7].norm(dim=-1, keepdim=True)).unbind(-1)
    turned = torch.stack(
        (x * cos + y * sin, y * cos - x * sin, z * cos + w * sin, w * cos - z * sin), -1
    )
    joined = torch.cat((arms[..., :3], turned, arms[..., 7:]), -1)
    return joined.flatten(-2).to(pose.dtype)
