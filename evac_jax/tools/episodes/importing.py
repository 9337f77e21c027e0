"""What importers of recordings share: options, camera, gripper, success, resizing."""

import argparse
import json
import reprlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from evac_jax.errors import ConfigError, DataError
from evac_jax.files import meaning
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
# A reward may be dense, or for a part of the task: only the user knows whether it means success.
REWARDS = ("next.reward", "reward", "rewards")
# Share of a side by which a camera's centre may be off the middle of pictures whose size is not
# told. Calibrated lenses are off by 1 to 2.5 %, intrinsics for 256 pixels on 240 by 3.3 %.
OFF_CENTRE = 0.03


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
        f"is above 0 in successful frames; auto: {', '.join(TOLD_BY)} if there is one, else last; "
        "refused where episodes differ in that, or where there is a reward alone",
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
        # A crop may move the centre anywhere; without a word, another size is likelier.
        if max(abs(x / width - 0.5), abs(y / height - 0.5)) > (0.5 if told else OFF_CENTRE):
            raise ConfigError(
                f"--camera={camera}: the centre ({x:g}, {y:g}) is not that of pictures of "
                f'{width} x {height} pixels; give "size": [H, W] that the intrinsics are for, also '
                "where the camera is off centre"
            )
    return height, width


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """Return frames uint8 [.. H W 3] with `size` pixels per side; 0 leaves them as they are."""
    if not size or frames.shape[-3:-1] == (size, size):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    small = [Image.fromarray(f).resize((size, size), Image.Resampling.LANCZOS) for f in flat]
    return np.stack([np.asarray(f) for f in small]).reshape(*frames.shape[:-3], size, size, 3)


def check_frames(frames: np.ndarray, where: str) -> None:
    """Refuse pictures uint8 [T .. H W 3] of which one was cast without scaling.

    Raises:
        DataError: see `meaning.check_frame`; names the first frame at fault.
    """
    for n, frame in enumerate(frames):
        meaning.check_frame(frame, f"{where}: frame {n}")


def check_opening(poses: np.ndarray, where: str, closed: float = 0.0) -> np.ndarray:
    """Return poses [T 8] as they are; their last number is the gripper's opening.

    Args:
        closed: the least number that it may be.

    Raises:
        DataError: an opening that is not within `closed`..1.
    """
    opening = poses[:, 7]
    if (opening < closed - 0.001).any() or (opening > 1.001).any():
        raise DataError(
            f"{where}: expected a gripper opening of {closed:.0f}..1 as the pose's last number, "
            f"got {opening.min():.3f}..{opening.max():.3f}; scale it first, so that 0 is closed "
            "and 1 is open"
        )
    return poses


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


class SuccessRule:
    """What --success means in all episodes of one source; `auto` is decided by the first of them.

    Args:
        rule: of --success.
    """

    def __init__(self, rule: str):
        self._rule = rule
        self._told: list[str] | None = None  # fields of the first episode that tell

    def of(
        self, names: Collection[str], column: Callable[[str], Sequence], length: int, where: str
    ) -> np.ndarray:
        """Return the success of an episode, bool [length].

        Args:
            names: the episode's fields.
            column: gives the values of one of them, one per frame.
            length: frames.
            where: begins messages.

        Raises:
            DataError: the rule's field is missing or holds no flags; or, of `auto`: other fields
                tell than in the first episode, one field says that the episode succeeds and
                another that it does not, or a reward alone tells.
        """
        if self._rule != AUTO:
            values = column(self._rule) if self._rule in names else None
            return success_of(self._rule, values, length, where)
        told = [name for name in TOLD_BY if name in names]
        told = told or [name for name in REWARDS if name in names]
        if self._told is None:
            self._told = told
            what = f"the field {told[0]}" if told else "the end of every episode (no field tells)"
            logging.info("success: %s; --success changes it", what)
        # Otherwise some episodes would succeed by a field, and others because they lack it.
        if told != self._told:
            raise DataError(
                f"{where}: fields that tell success: expected {self._told or 'none'} as in the "
                f"first episode, got {told or 'none'}; mend the data, or say by --success what "
                f"counts in all episodes: a field's name, {LAST} or {NEVER}"
            )
        if told and told[0] in REWARDS:
            raise DataError(
                f"{where}: a reward, {told[0]!r}, need not mean success; expected one of "
                f"{', '.join(TOLD_BY)}, or --success={told[0]} if it is above 0 in successful "
                f"frames only, or --success={LAST} or {NEVER}"
            )
        if not told:
            return success_of(LAST, None, length, where)
        marks = [success_of(name, column(name), length, where) for name in told]
        for name, mark in zip(told, marks, strict=True):
            # By episode: some formats write the end's success into every frame.
            if mark.any() != marks[0].any():
                raise DataError(
                    f"{where}: {told[0]!r} and {name!r} contradict each other, "
                    f"{bool(marks[0].any())} and {bool(mark.any())}; choose one for all episodes: "
                    f"--success={told[0]} or --success={name}"
                )
        return marks[0]


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
