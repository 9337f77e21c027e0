"""What importers of recordings share: options, camera, gripper, success, resizing."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from evac_jax.errors import ConfigError, DataError, EvacJaxError
from evac_jax.sim.camera import Matrices, resolve_camera
from evac_jax.tools.command_line import Parser

# Gripper entry of an action -> ours: -1 opens, +1 closes.
GRIPPERS = {
    "closes": lambda g: g,
    "opens": lambda g: -g,
    "zero_closes": lambda g: 1 - 2 * g,
}
LAST, NEVER = "last", "never"


def parser_of(tool: str, doc: str | None) -> Parser:
    """Return a parser with the options that every importer has; arguments as of `Parser`."""
    parser = Parser(tool, doc)
    add = parser.add_argument
    add("--source", required=True, type=Path, help="folder to read")
    add("--out", required=True, help="new folder for the recording")
    add("--name", default="imported", help="who played; the source of the episodes")
    parser.add_image_size()
    add(
        "--camera",
        required=True,
        help='JSON file with "intrinsic" [V 3 3] in pixels, "c2w" [V 4 4], +Z forward, and '
        '"size" [H, W] that the intrinsics are for; or libero, for its front camera',
    )
    add(
        "--gripper",
        choices=GRIPPERS,
        default="closes",
        help="what +1 does in the source: closes, opens; zero_closes: 0 closes and 1 opens",
    )
    add(
        "--success",
        default=LAST,
        help="last: every episode ends in success; never: none does; or the name of a field that "
        "is above 0 in successful frames",
    )
    return parser


def read_camera(camera: str, views: int, stored: tuple[int, int], wanted: int) -> Matrices:
    """Return intrinsics [V 3 3], for frames of the wanted size, and c2w [V 4 4], float32.

    Args:
        camera: of --camera.
        views: of the frames, V.
        stored: height and width of the source's pictures.
        wanted: of --image_size.

    Raises:
        ConfigError: the file cannot be read or does not hold one camera per view.
    """
    values, size = camera, stored
    if camera != "libero":
        try:
            values = json.loads(Path(camera).read_text())
            size = tuple(values.pop("size", stored))
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"--camera={camera}: not a readable JSON object ({error})") from error
    intrinsic, c2w = resolve_camera(values, None, views)
    height, width = (wanted, wanted) if wanted else stored
    scale = np.array((width / size[1], height / size[0], 1), np.float32)
    return intrinsic * scale[:, None], c2w


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """Return frames uint8 [.. H W 3] with `size` pixels per side; 0 leaves them as they are."""
    if not size or frames.shape[-3:-1] == (size, size):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    small = [Image.fromarray(f).resize((size, size), Image.Resampling.LANCZOS) for f in flat]
    return np.stack([np.asarray(f) for f in small]).reshape(*frames.shape[:-3], size, size, 3)


def check_actions(actions: np.ndarray, gripper: str, where: str) -> np.ndarray:
    """Return actions float32 [T 7] with our sense of the gripper.

    Raises:
        DataError: not 7 finite numbers in [-1, 1] each.
    """
    actions = np.array(actions, np.float32)
    if actions.ndim != 2 or actions.shape[1] != 7 or not np.isfinite(actions).all():
        raise DataError(f"{where}: expected actions as 7 finite numbers, got {actions.shape}")
    actions[:, 6] = GRIPPERS[gripper](actions[:, 6])
    if (largest := float(np.abs(actions).max(initial=0))) > 1.001:
        raise DataError(
            f"{where}: actions reach {largest:.3f} after --gripper={gripper}, expected deltas in "
            "[-1, 1] as the environment executes them; scale them, or choose another --gripper"
        )
    return actions.clip(-1, 1)


def check_poses(poses: np.ndarray, where: str) -> np.ndarray:
    """Return poses float32 [T 8]; their gripper is not looked at.

    Raises:
        DataError: not 8 finite numbers each, or quaternions that are none.
    """
    poses = np.asarray(poses, np.float32)
    if poses.ndim != 2 or poses.shape[1] != 8 or not np.isfinite(poses).all():
        raise DataError(f"{where}: expected poses of 8 finite numbers, got {poses.shape}")
    norms = np.linalg.norm(poses[:, 3:7], axis=1)
    if len(wrong := np.flatnonzero(np.abs(norms - 1) > 0.01)):
        raise DataError(
            f"{where}: frame {wrong[0]}: expected xyz, quaternion xyzw of length 1, gripper; the "
            f"quaternion's length is {norms[wrong[0]]:.3f}; choose another field for the state"
        )
    return poses


def success_of(rule: str, values: Sequence | None, length: int, where: str) -> np.ndarray:
    """Return bool [length] by the rule of --success.

    Args:
        values: of the field that the rule names, one per frame; None if there is no such field.
    """
    success = np.zeros(length, bool)
    if rule == LAST:
        success[-1] = True
    elif rule != NEVER:
        if values is None:
            raise DataError(
                f"{where}: no field {rule!r}; --success takes a field's name, {LAST} or {NEVER}"
            )
        try:
            success = np.asarray(values, float).reshape(length) > 0
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: {rule!r}: expected one number or flag per frame ({error})"
            ) from error
    return success


def finish(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> None:
    """Call an importer, and say what came of it."""
    logging.set_verbosity(logging.INFO)
    try:
        if args.image_size < 0:
            raise ConfigError(f"--image_size: expected 0 or more pixels, got {args.image_size}")
        count = run(args)
    except EvacJaxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    logging.info("%d episodes -> %s", count, args.out)
