r"""Makes a recording out of a LeRobot dataset (v2.0, v2.1 or v3.0), without the lerobot package.

    python -m evac_jax.tools.episodes.import_lerobot --source DIR --out DIR2 --camera CAMERA.json \
        --images observation.images.image --state axis_angle --gripper closes --image_size 256

Pictures come from mp4 files or from PNGs inside the parquet files. A dataset has as many actions as
frames; the last action of an episode leads to no frame and is left out. Success comes from the
field `next.success` where the dataset has it. Numbers of states and actions whose names in
meta/info.json are known are put into our order; names that say otherwise are refused. Episodes
outside of its split "train" are held out; where that is the only one, a hash decides
(docs/episodes.md).
"""

import argparse
import itertools
from collections.abc import Sequence

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files import cards, meaning
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.episodes import importing, lerobot_names
from evac_jax.tools.episodes.lerobot_dataset import LeRobotDataset, LeRobotEpisode

TURN = 2 * np.pi + 0.01  # radians; no rotation vector is longer
FINGER_TRAVEL = 0.04  # metres that each finger of LIBERO's gripper moves
# Columns that tell the instruction anew in every frame, beside task_index.
TEXTS = ("language_instruction", "natural_language_instruction", "instruction", "task")


def poses_of(state: np.ndarray, kind: str, where: str = "--state") -> np.ndarray:
    """Return poses [T 8]: xyz, quaternion xyzw, opening 0..1.

    Args:
        state: [T 8]; "quaternion": like the result; "axis_angle": xyz, rotation vector and the
            positions of two fingers, +-0.04 m when open, as LIBERO has it.
        kind: of --state.
        where: begins messages.

    Raises:
        DataError: the numbers are not what `kind` says.
    """
    state = np.asarray(state, np.float32)
    if state.ndim != 2 or state.shape[1] != 8:
        raise DataError(f"{where}: --state={kind}: expected 8 numbers per frame, got {state.shape}")
    if kind == "quaternion":
        return importing.check_opening(state, f"{where}: --state=quaternion")
    vector, fingers = state[:, 3:6], state[:, 6:]
    angle = np.linalg.norm(vector, axis=1, keepdims=True)
    turn, open_by = angle.max(), np.abs(fingers).max()
    if turn > TURN or open_by > 2 * FINGER_TRAVEL:
        raise DataError(
            f"{where}: --state=axis_angle: expected a rotation vector of at most {TURN:.2f} and "
            f"fingers within +-{FINGER_TRAVEL} m, got {turn:.3g} and {open_by:.3g}; "
            "are the angles degrees, or is it a quaternion (--state=quaternion)?"
        )
    xyz = 0.5 * np.sinc(angle / (2 * np.pi)) * vector  # sin(angle / 2) * axis, also at 0
    opening = (np.abs(fingers).sum(1, keepdims=True) / (2 * FINGER_TRAVEL)).clip(0, 1)
    parts = (state[:, :3], xyz, np.cos(angle / 2), opening)
    return np.concatenate(parts, axis=1, dtype=np.float32)


def run(args: argparse.Namespace) -> int:
    """Import as told; return the number of episodes."""
    data, count = LeRobotDataset(args.source, args.images), 0
    episodes = data.episodes()
    first = next(episodes, None)
    if first is None:
        raise DataError(f"--source={args.source}: no episodes")
    rules = _Rules(data, args)
    views, *stored = data.frames(first).shape[1:4]
    intrinsic, c2w = importing.read_camera(args.camera, views, tuple(stored), args.image_size)
    size = (args.image_size, args.image_size) if args.image_size else stored
    with EpisodeWriter(
        args.out,
        image_shape=(views, *size, 3),
        instructions=data.tasks,
        sources=[args.name],
        intrinsic=intrinsic,
        c2w=c2w,
        facts=cards.card(dataset=args.source.name),
    ) as writer:
        for episode in itertools.chain([first], episodes):
            frames = data.frames(episode)
            if frames.shape[1:4] != (views, *stored):
                raise DataError(
                    f"episode {episode.index}: pictures {frames.shape[2:4]}, the first episode's "
                    f"are {stored}; one camera cannot fit both: import them apart"
                )
            importing.check_frames(frames, f"episode {episode.index}")
            read = _episode(episode, args, rules)
            read["held_out"] = data.is_held_out(episode)
            writer.add(frames=importing.resize(frames, args.image_size), source=0, **read)
            count += 1
    return count


class _Rules:
    """What holds for all episodes of a dataset: how success is told, the order of numbers."""

    def __init__(self, data: LeRobotDataset, args: argparse.Namespace):
        self.success = importing.SuccessRule(args.success)
        state = f"{args.state_key!r}, --state={args.state}"
        kinds = lerobot_names.STATES[args.state]
        self.state = lerobot_names.order_of(data.names(args.state_key), kinds, state)
        names = data.names(args.action_key)
        self.action = lerobot_names.order_of(names, lerobot_names.ACTION, repr(args.action_key))


def _episode(episode: LeRobotEpisode, args: argparse.Namespace, rules: _Rules) -> dict:
    """Return actions [T-1 7], poses [T 8], success [T] and task of an episode of T rows."""
    where, count = f"episode {episode.index}", len(episode.rows)
    if count < 2:
        raise DataError(f"{where}: {count} frame(s); an episode needs two at least")
    if episode.column("frame_index") != list(range(count)):
        raise DataError(f"{where}: frame_index does not count 0..{count - 1}")
    tasks, columns = episode.column("task_index"), episode.rows.column_names
    for name in ("task_index", *TEXTS):
        values = episode.rows[name].to_pylist() if name in columns else []
        if changes := [n for n, value in enumerate(values) if value != values[0]]:
            raise DataError(
                f"{where}: the instruction changes at frame {changes[0]} ({name} {values[0]!r} to "
                f"{values[changes[0]]!r}); a recording has one per episode: split it first"
            )
    state = lerobot_names.put_in_order(episode.numbers(args.state_key), rules.state)
    poses = meaning.check_poses(poses_of(state, args.state, where), where)
    actions = lerobot_names.put_in_order(episode.numbers(args.action_key), rules.action)
    actions = importing.check_actions(actions, args.gripper, where)[:-1]
    meaning.check_deltas(actions, poses, where)
    return {
        "actions": actions,
        "poses": poses,
        "success": rules.success.of(columns, episode.column, count, where),
        "task": int(tasks[0]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = importing.parser_of("episodes.import_lerobot", __doc__)
    parser.add_argument("--images", required=True, nargs="+", help="features that are the views")
    parser.add_argument("--state_key", default="observation.state", help="feature of the poses")
    parser.add_argument("--action_key", default="action", help="feature of the actions")
    parser.add_argument(
        "--state",
        choices=("axis_angle", "quaternion"),
        default="axis_angle",
        help="how a pose is written: xyz, rotation vector, two fingers; or as ours",
    )
    importing.finish(run, parser.parse_args(argv))


if __name__ == "__main__":
    run_tool(main)
