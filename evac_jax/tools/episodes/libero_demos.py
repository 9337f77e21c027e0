"""LIBERO's published demonstrations: HDF5 files, one per task, one group per demonstration.

A file `<task>_demo.hdf5` holds data/demo_<n> with `actions` [T 7], `states` [T d], `rewards` [T]
and `obs/agentview_rgb` [T H W 3], `obs/ee_pos`, `obs/ee_ori` (rotation vector),
`obs/gripper_states`, `obs/joint_states`. `states[t]` is the state before `actions[t]`. What `obs`
shows at t differs:

* LIBERO's own files show what came after action t (`scripts/create_dataset.py` steps first).
* OpenVLA's regenerated ones show what was before it (`regenerate_libero_dataset.py`).

The arm's joints stand in both `states` and `obs`, so the numbers tell which of the two a file is.
`obs/eye_in_hand_rgb` is not read: the cameras of a recording are at rest.

Source: Lifelong-Robot-Learning/LIBERO (1952000), moojink/openvla-oft (213c5ff).
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from absl import logging

from evac_jax.errors import DataError
from evac_jax.files import meaning
from evac_jax.tools.episodes import importing
from evac_jax.tools.episodes.import_lerobot import poses_of

SUFFIX = "_demo.hdf5"
JOINTS = slice(1, 8)  # of a flattened state: time, then the arm's joints
NO_MOTION = 1e-4  # norm of the first six numbers of an action
# How the rows of a stored picture are told in `macros_image_convention` -> what turns it as
# policies see it: by 180 degrees from MuJoCo's, whose bottom row comes first.
TURNS = {"opengl": np.s_[:, ::-1, ::-1], "opencv": np.s_[:, :, ::-1]}


@dataclass(frozen=True)
class Demo:
    """One demonstration of T actions.

    Attributes:
        where: file and group, for messages.
        actions: as LIBERO takes them, float32 [T 7] in [-1, 1], gripper +1 closes.
        states: MuJoCo's, before each action, float64 [T d].
        frames: what was stored, turned as policies see it, uint8 [T H W 3].
        poses: of the hand in these frames: xyz (m), quaternion xyzw, opening 0..1, float32 [T 8].
        success: the task is done after each action, bool [T].
        observed_after: whether frame and pose t show what came after action t, or was before it.
        fixtures: body -> xyz (m), quaternion wxyz of the things that do not move.
    """

    where: str
    actions: np.ndarray
    states: np.ndarray
    frames: np.ndarray
    poses: np.ndarray
    success: np.ndarray
    observed_after: bool
    fixtures: dict[str, list[float]]

    def stored(self) -> dict[str, np.ndarray]:
        """Return the stored pictures as `EpisodeWriter.add` takes them: action t on frame t.

        Where frames show what was before an action, the last action has no frame after it; it is
        left out, and success is noted on the last frame there is.
        """
        first = int(self.observed_after)
        return {
            "frames": self.frames[:, None],
            "actions": self.actions[first : len(self.actions) - 1 + first],
            "poses": self.poses,
            "success": self.success,
        }


def task_of(path: Path) -> str:
    """Return the name of the task whose demonstrations a file holds.

    Raises:
        DataError: the file is not named so.
    """
    if not path.name.endswith(SUFFIX):
        raise DataError(f"{path}: expected a file named <task>{SUFFIX}; the name tells the task")
    return path.name.removesuffix(SUFFIX)


def read_demos(path: Path) -> Iterator[Demo]:
    """Yield a file's demonstrations in the order of their numbers.

    Raises:
        DataError: the file or one of its demonstrations is damaged or no such thing.
    """
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            told = data.attrs.get("macros_image_convention", "opengl")
            convention = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
            if convention not in TURNS:
                raise DataError(
                    f"{path}: macros_image_convention: expected one of {sorted(TURNS)}, got "
                    f"{convention!r}"
                )
            names = [name for name in data if re.fullmatch(r"demo_\d+", name)]
            if not names:
                raise DataError(f"{path}: no group data/demo_<n>")
            for name in sorted(names, key=lambda name: int(name[5:])):
                yield _demo(data[name], convention, f"{path.name}: {name}")
    except (OSError, KeyError) as error:
        raise DataError(f"{path}: not a readable file of demonstrations: {error}") from error


def _demo(group: h5py.Group, convention: str, where: str) -> Demo:
    def read(name: str, width: int) -> np.ndarray:
        values = np.asarray(group[name][()])
        if values.ndim != 2 or len(values) != steps or (width and values.shape[1] != width):
            raise DataError(
                f"{where}: {name}: expected [{steps} {width or 'd'}], got {list(values.shape)}"
            )
        return values

    steps = len(group["actions"])
    if steps < 2:
        raise DataError(f"{where}: {steps} action(s); a demonstration needs two at least")
    actions = importing.check_actions(read("actions", 7), "closes", where)
    states = read("states", 0).astype(np.float64)
    pictures = group["obs/agentview_rgb"][()]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[::3] != (steps, 3):
        raise DataError(
            f"{where}: obs/agentview_rgb: expected uint8 [{steps} H W 3], got {pictures.dtype} "
            f"{list(pictures.shape)}"
        )
    importing.check_frames(pictures, where)
    parts = ("obs/ee_pos", 3), ("obs/ee_ori", 3), ("obs/gripper_states", 2)
    poses = np.concatenate([read(name, width) for name, width in parts], axis=1)
    marks = "rewards" if "rewards" in group else "dones"
    return Demo(
        where=where,
        actions=actions,
        states=states,
        frames=np.ascontiguousarray(pictures[TURNS[convention]]),
        poses=meaning.check_poses(poses_of(poses, "axis_angle", where), where),
        success=importing.success_of(marks, group[marks][()], steps, where),
        observed_after=_observed_after(states[:, JOINTS], read("obs/joint_states", 7), where),
        fixtures=fixtures_of(group.attrs.get("model_file", ""), where),
    )


def _observed_after(states: np.ndarray, seen: np.ndarray, where: str) -> bool:
    """Return whether joints `seen` [T 7] are those after the actions, given those before them."""
    before = np.abs(seen - states).mean()
    after = np.abs(seen[:-1] - states[1:]).mean()
    if max(before, after) < 3 * min(before, after) or min(before, after) > 0.02:
        raise DataError(
            f"{where}: cannot tell whether obs shows what was before the actions or came after "
            f"them: obs/joint_states differ from the arm's joints in states by {before:.2g} and "
            f"{after:.2g} rad on average; expected one of them to be near 0"
        )
    return bool(after < before)


def fixtures_of(model: str | bytes, where: str) -> dict[str, list[float]]:
    """Return where a MuJoCo model places what does not move: body -> xyz (m), quaternion wxyz.

    A state does not hold that, and LIBERO draws it anew at every reset.

    Args:
        model: the attribute `model_file`, XML; "" = none, as in regenerated files.
        where: begins the message.
    """
    if not model:
        logging.log_first_n(
            logging.WARNING, "%s has no model_file: fixtures stand where LIBERO's seed puts them",
            1, where,
        )  # fmt: skip
        return {}
    try:
        world = ET.fromstring(model).find("worldbody")
        bodies = [] if world is None else world.findall("body")
        fixed = [
            body
            for body in bodies
            # LIBERO's things are named <name>_main; those that move have a free joint.
            if body.get("name", "").endswith("_main")
            and body.find("freejoint") is None
            and body.find("joint[@type='free']") is None
        ]
        return {
            body.get("name", ""): [
                *map(float, body.get("pos", "0 0 0").split()),
                *map(float, body.get("quat", "1 0 0 0").split()),
            ]
            for body in fixed
        }
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{where}: model_file: not a MuJoCo model: {error}") from error


def without_no_ops(episode: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an episode as `EpisodeWriter.add` takes it, without the actions that do nothing.

    An action does nothing if its first six numbers are below 1e-4 in norm and its gripper is the
    one of the last action that was kept. The frame on which it was decided goes with it.

    Source: moojink/openvla-oft, regenerate_libero_dataset.py (213c5ff), `is_noop`. Difference:
    there the other actions are played again and what they then lead to is recorded.
    """
    actions = episode["actions"]
    still = np.linalg.norm(actions[:, :6], axis=1) < NO_MOTION
    kept: list[int] = []
    for t in range(len(actions)):
        if not (still[t] and (not kept or actions[t, 6] == actions[kept[-1], 6])):
            kept.append(t)
    rows = [*kept, len(actions)]
    return {name: value[kept if name == "actions" else rows] for name, value in episode.items()}
