"""What importers of recordings share: options, camera, gripper, success, resizing."""

import argparse
import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from evac_jax.errors import ConfigError, DataError
from evac_jax.sim.camera import Matrices, resolve_camera
from evac_jax.tools.command_line import Parser

# Gripper entry of an action -> ours: -1 opens, +1 closes.
GRIPPERS = {
    "closes": lambda g: g,
    "opens": lambda g: -g,
    "zero_closes": lambda g: 1 - 2 * g,
}
AUTO, LAST, NEVER = "auto", "last", "never"
# Fields that tell success, in the formats that are read here.
TOLD_BY = ("next.success", "success", "is_success")


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
        default=AUTO,
        help="last: every episode ends in success; never: none does; or the name of a field that "
        f"is above 0 in successful frames; auto: {', '.join(TOLD_BY)} if there is one, else last",
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
    values, told = camera, None
    if camera != "libero":
        try:
            values = json.loads(Path(camera).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--camera={camera}: not a readable JSON file ({error})") from error
        if not isinstance(values, dict) or values.keys() - {"size"} != {"intrinsic", "c2w"}:
            got = sorted(values) if isinstance(values, dict) else values
            raise ConfigError(
                f'--camera={camera}: expected a JSON object of "intrinsic", "c2w" and perhaps '
                f'"size", as --help says, got {reprlib.repr(got)}'
            )
        told = values.pop("size", None)
    try:
        intrinsic, c2w = resolve_camera(values, None, views)
    except ConfigError as error:
        raise ConfigError(f"--camera={camera}: {error}") from error
    size = stored if camera == "libero" else _size_of(camera, told, intrinsic, stored)
    height, width = (wanted, wanted) if wanted else stored
    scale = np.array((width / size[1], height / size[0], 1), np.float32)
    return intrinsic * scale[:, None], c2w


def _size_of(
    camera: str, told: Any, intrinsic: np.ndarray, stored: tuple[int, int]
) -> tuple[int, int]:
    """Return the height and width that intrinsics [V 3 3] are for: as told, else the pictures'."""
    is_size = isinstance(told, list) and len(told) == 2 and all(type(n) is int for n in told)
    if told is not None and (not is_size or min(told) < 1):
        raise ConfigError(
            f'--camera={camera}: "size": expected [height, width], got {reprlib.repr(told)}'
        )
    height, width = told or stored
    for x, y in intrinsic[:, :2, 2]:
        # A crop may move the centre; by more than this without a word, another size is likelier.
        if max(abs(x / width - 0.5), abs(y / height - 0.5)) > (0.5 if told else 0.15):
            raise ConfigError(
                f"--camera={camera}: the centre ({x:g}, {y:g}) is not that of pictures of "
                f'{width} x {height} pixels; give "size": [H, W] that the intrinsics are for'
            )
    return height, width


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
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise DataError(f"{where}: expected actions of 7 numbers, got {actions.shape}")
    if len(wrong := np.flatnonzero(~np.isfinite(actions).all(1))):
        raise DataError(f"{where}: frame {wrong[0]}: the action holds NaN or infinity")
    hand = actions[:, 6]
    if gripper != "zero_closes" and hand.min() >= 0 and hand.min() < 0.1 and hand.max() > 0.9:
        raise DataError(
            f"{where}: the actions' gripper lies within 0..1, --gripper={gripper} expects -1 and "
            "+1; is it --gripper=zero_closes (0 closes, 1 opens)?"
        )
    actions[:, 6] = GRIPPERS[gripper](actions[:, 6])
    if (largest := float(np.abs(actions).max(initial=0))) > 1.001:
        raise DataError(
            f"{where}: actions reach {largest:.3f} after --gripper={gripper}, expected deltas in "
            "[-1, 1] as the environment executes them; scale them, or choose another --gripper"
        )
    return actions.clip(-1, 1)


def success_rule(rule: str, names: Iterable[str]) -> str:
    """Return the rule of --success that counts for a source with fields `names`; say it if chosen.

    A field that tells success is used where there is one, because not every episode succeeds.
    """
    if rule != AUTO:
        return rule
    rule = next((name for name in TOLD_BY if name in names), LAST)
    told = "the end of every episode (no field tells)" if rule == LAST else f"the field {rule}"
    logging.log_first_n(logging.INFO, "success: %s; --success changes it", 1, told)
    return rule


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
            numbers = np.asarray(values, float).reshape(length)
            if not np.isfinite(numbers).all():
                raise ValueError("some are empty or NaN")
            success = numbers > 0
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: {rule!r}: expected one number or flag per frame ({error})"
            ) from error
    return success


def finish(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> None:
    """Call an importer, and say what came of it."""
    logging.set_verbosity(logging.INFO)
    count = run(args)
    logging.info("%d episodes -> %s", count, args.out)
