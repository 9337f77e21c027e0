"""Whether arrays from outside mean what their shape says: poses, frames, actions.

Eight numbers are a pose only if they are a position, a quaternion and a gripper; others train on
without a word. What no number can tell is left to the docs: a quaternion written w, x, y, z has the
length 1 too, and so has a picture whose red and blue are swapped.
"""

import numpy as np

from evac_jax.errors import DataError

POSE = "xyz (metres), quaternion xyzw of length 1, gripper"
QUATERNION_ERROR = 0.01
REACH = 10.0  # metres; no arm is farther from its origin
FINGER = 0.06  # metres; LIBERO's fingers stand at +-0.04 at most
# Rounding and noise may pass 1 a little; degrees, millimetres and a gripper in 0..255 do by far.
ACTION_BOUND = 2.0


def check_poses(poses: np.ndarray, where: str) -> np.ndarray:
    """Return poses float32 [T 8]; their gripper is not looked at.

    Args:
        where: begins the message.

    Raises:
        DataError: not 8 finite numbers each, no quaternions, or positions that are not in metres;
            names the first frame at fault and what it may be instead.
    """
    poses = np.asarray(poses, np.float32)
    if poses.ndim != 2 or poses.shape[1] != 8:
        raise DataError(f"{where}: expected poses of 8 numbers, {POSE}; got {list(poses.shape)}")
    if len(wrong := np.flatnonzero(~np.isfinite(poses).all(1))):
        raise DataError(
            f"{where}: {_at(wrong, poses)}the pose holds NaN or infinity: "
            f"{_shown(poses[wrong[0]])}; leave the episode out, or repair it"
        )
    lengths = np.linalg.norm(poses[:, 3:7], axis=1)
    if len(wrong := np.flatnonzero(np.abs(lengths - 1) > QUATERNION_ERROR)):
        pose = poses[wrong[0]]
        raise DataError(
            f"{where}: {_at(wrong, poses)}expected {POSE}; the quaternion's "
            f"length is {lengths[wrong[0]]:.3f} in {_shown(pose)}. {_guess(pose)}"
        )
    if len(wrong := np.flatnonzero(np.abs(poses[:, :3]).max(1) > REACH)):
        raise DataError(
            f"{where}: {_at(wrong, poses)}expected xyz in metres, got "
            f"{_shown(poses[wrong[0], :3])}; are they millimetres?"
        )
    return poses


def _at(wrong: np.ndarray, poses: np.ndarray) -> str:
    """Name the first frame at fault, if there are several frames."""
    return f"frame {wrong[0]} ({len(wrong)} in all): " if len(poses) > 1 else ""


def _guess(pose: np.ndarray) -> str:
    """What numbers that are no pose may be."""
    if not pose.any():
        return "Zeros: no pose was recorded"
    if abs(pose[6]) < FINGER and abs(pose[7]) < FINGER:
        return (
            "Position, axis-angle and two fingers, as LIBERO has it? Convert them first, as "
            "tools.episodes.import_lerobot does with --state=axis_angle"
        )
    if abs(np.linalg.norm(pose[4:8]) - 1) <= QUATERNION_ERROR:
        return "Is the gripper written before the quaternion?"
    if np.abs(pose[3:6]).max() > 2 * np.pi:
        return "Angles in degrees?"
    return "Axis-angle or Euler angles? Choose another field, or convert them first"


def check_frame(frame: np.ndarray, where: str) -> None:
    """Refuse a uint8 picture [.. 3] that holds nothing but 0, 1 and 255.

    That is what frames in 0..1 or -1..1 become when they are cast to uint8.

    Raises:
        DataError: it is such a one.
    """
    if not ((frame > 1) & (frame < 255)).any():
        raise DataError(
            f"{where}: the picture holds no value from 2 to 254; expected uint8 of 0..255. Was it "
            "cast from 0..1 or -1..1? Scale it first"
        )


def check_actions(actions: np.ndarray, where: str) -> None:
    """Refuse actions [T 7] that no environment could mean.

    Raises:
        DataError: not finite, or far outside of [-1, 1]; names the first one at fault.
    """
    if len(wrong := np.flatnonzero(~np.isfinite(actions).all(1))):
        raise DataError(
            f"{where}: {_at(wrong, actions)}actions: expected finite numbers, got "
            f"{_shown(actions[wrong[0]])}"
        )
    if len(wrong := np.flatnonzero(np.abs(actions).max(1, initial=0) > ACTION_BOUND)):
        raise DataError(
            f"{where}: {_at(wrong, actions)}actions: expected changes of the pose scaled to "
            f"[-1, 1], and a gripper in it, got {_shown(actions[wrong[0]])}; degrees, "
            "millimetres, or a gripper in 0..255? Scale them first"
        )


def check_deltas(actions: np.ndarray, poses: np.ndarray, where: str) -> None:
    """Refuse actions [T 7] that repeat the positions of poses [T+1 8] instead of changing them.

    Raises:
        DataError: they are the absolute positions of this frame or of the next one.
    """
    for target in (poses[:-1, :3], poses[1:, :3]):
        if np.abs(target).max(initial=0) > 0.1 and np.abs(actions[:, :3] - target).max() < 0.01:
            raise DataError(
                f"{where}: the actions are the poses' own positions; expected changes of the pose, "
                "scaled to [-1, 1], as the environment executes them"
            )


def _shown(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"
