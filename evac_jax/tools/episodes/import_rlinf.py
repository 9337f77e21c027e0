r"""Makes a recording out of RLinf's `.npy` episodes, one file per episode.

    python -m evac_jax.tools.episodes.import_rlinf --source DIR --out DIR2 \
        --camera libero --image_size 256

A file is an object array of one dict per frame: `image` (uint8 [H W 3] or [V H W 3]), a pose
(`state` or `abs_action`, at the first frame also `init_ee_pose`: xyz, quaternion xyzw, opening of
the gripper, 0..1 or -1..1), `delta_action` (7 numbers) and, at the first frame, `instruction` or
`task`. Files are read without running what may hide in their pickles.

Source: data layout of RLinf `EvacEnv` (revision c9f1d8471), which reads the first frame only; the
action of a frame is taken to lead to the next one, and the last frame's to be without effect.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files import cards, meaning
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.files.restricted_npy import load_objects
from evac_jax.sim.initial_states import first_frame
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.episodes import importing

POSES = ("state", "abs_action")


def read_episode(path: Path, success: importing.SuccessRule, gripper: str) -> dict:
    """Return frames [T+1 V H W 3], actions [T 7], poses [T+1 8] and success [T+1] of a file.

    Args:
        path: of the file.
        success: the rule of --success for all files.
        gripper: of --gripper.

    Raises:
        DataError: names the file and the frame that lacks something.
    """
    image, pose, _ = first_frame(path)
    frames = load_objects(path)
    if len(frames) < 2:
        raise DataError(f"{path}: {len(frames)} frame(s); an episode needs two at least")
    if wrong := [n for n, frame in enumerate(frames) if not isinstance(frame, dict)]:
        raise DataError(f"{path}: frame {wrong[0]} is no dict")
    key = next((k for k in POSES if k in frames[1]), None)
    if key is None:
        raise DataError(f"{path}: frame 1 has no pose; expected one of {POSES}")

    def column(name: str, shape: tuple[int, ...], rows: range, kinds: str = "fiu") -> np.ndarray:
        values = [np.asarray(frames[n].get(name)) for n in rows]
        for n, value in zip(rows, values, strict=True):
            # The first axis is the view's, and may be left out when there is one.
            fits = value.shape == shape or (1, *value.shape) == shape
            if not fits or value.dtype.kind not in kinds:
                raise DataError(
                    f"{path}: frame {n} needs {name!r} of {shape}, got {value.dtype} {value.shape}"
                )
        return np.stack([value.reshape(shape) for value in values])

    last = len(frames) - 1
    images = column("image", image.shape, range(last + 1), "u")
    if images.dtype != np.uint8:
        raise DataError(f"{path}: expected images of 0..255 as uint8, got {images.dtype}")
    importing.check_frames(images, str(path))
    poses = np.concatenate((pose[None], column(key, (8,), range(1, last + 1))))
    _check_instruction(path, frames)
    # Some of RLinf's files hold -1..1, as its pictures of the hand are drawn (docs/episodes.md).
    poses = importing.check_opening(meaning.check_poses(poses, str(path)), str(path), closed=-1.0)
    actions = importing.check_actions(column("delta_action", (7,), range(last)), gripper, str(path))
    meaning.check_deltas(actions, poses, str(path))

    def marks(name: str) -> list:
        if without := [n for n, frame in enumerate(frames) if name not in frame]:
            raise DataError(
                f"{path}: frame {without[0]} ({len(without)} in all) has no {name!r}, which others "
                "have; mend the file, or say by --success what counts instead"
            )
        return [frame[name] for frame in frames]

    names = set().union(*frames)
    return {
        "frames": images,
        "actions": actions,
        "poses": poses,
        "success": success.of(names, marks, len(frames), str(path)),
    }


def _check_instruction(path: Path, frames: np.ndarray) -> None:
    """Refuse an episode whose instruction changes on the way."""
    for key in ("instruction", "task"):
        texts = [str(frame[key]) for frame in frames if key in frame]
        if changes := [text for text in texts if text != texts[0]]:
            raise DataError(
                f"{path}: {key!r} changes within the episode, from {texts[0]!r} to {changes[0]!r}; "
                "a recording has one per episode: split the file first"
            )


def run(args: argparse.Namespace) -> int:
    """Import as told; return the number of episodes."""
    paths = sorted(args.source.glob("*.npy"))
    if not paths:
        raise DataError(f"--source={args.source}: expected *.npy episodes, found none")
    texts = [first_frame(path)[2] for path in paths]
    instructions = list(dict.fromkeys(texts))
    image = first_frame(paths[0])[0]
    success = importing.SuccessRule(args.success)
    views, stored = len(image), image.shape[1:3]
    intrinsic, c2w = importing.read_camera(args.camera, views, stored, args.image_size)
    size = (args.image_size, args.image_size) if args.image_size else stored
    with EpisodeWriter(
        args.out,
        image_shape=(views, *size, 3),
        instructions=instructions,
        sources=[args.name],
        intrinsic=intrinsic,
        c2w=c2w,
        facts=cards.card(files=len(paths)),
    ) as writer:
        for path, text in zip(paths, texts, strict=True):
            episode = read_episode(path, success, args.gripper)
            if episode["frames"].shape[1:] != image.shape:
                raise DataError(
                    f"{path}: images {episode['frames'].shape[1:]}, the first file's are "
                    f"{image.shape}; one camera cannot fit both: import them apart"
                )
            episode["frames"] = importing.resize(episode["frames"], args.image_size)
            writer.add(**episode, task=instructions.index(text), source=0)
    return len(paths)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    importing.finish(run, importing.parser_of("episodes.import_rlinf", __doc__).parse_args(argv))


if __name__ == "__main__":
    run_tool(main)
