"""First frames, poses and instructions that imagined episodes start from.

A source names its starts 0..num_starts-1 and loads any of them as a batch. Sources are listed in
`INITIAL_STATES` as lazy import strings, so a new one is a class and a line.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import cards, meaning
from evac_jax.files.atomic import whole_folder
from evac_jax.files.restricted_npy import load_array, load_objects
from evac_jax.files.start_frames import (
    CARD_FILE,
    IMAGES_FILE,
    KEYFRAME_MARK,
    POSES_FILE,
    TASKS_FILE,
    episode_files,
    is_packed,
    keyframe_files,
)
from evac_jax.sim.camera import Matrices, libero_camera

INITIAL_STATES = {
    "npy": "evac_jax.sim.initial_states:NpyStarts",
    "recording": "evac_jax.sim.recorded_starts:FolderStarts",
    "miniature": "evac_jax.miniature.starts:MiniatureStarts",
}
POSE_DIM = 8
PROBLEMS_SHOWN = 10
Start = tuple[np.ndarray, np.ndarray, str]  # image uint8 [V H W 3], pose float32 [8], instruction


@dataclass(frozen=True)
class Starts:
    """A batch of initial states.

    Attributes:
        images: first frames, 0..255, at the size they were stored, uint8 [B V H W 3].
        poses: xyz (m), quaternion xyzw, gripper, float32 [B 8].
        task: index into the source's `instructions`, int32 [B].
    """

    images: np.ndarray
    poses: np.ndarray
    task: np.ndarray


class InitialStates(Protocol):
    """A source of initial states.

    Attributes:
        num_starts: starts are named 0..num_starts-1.
        instructions: every instruction that occurs, each once.
    """

    num_starts: int
    instructions: tuple[str, ...]

    @property
    def camera(self) -> Matrices | None:
        """Intrinsic [V 3 3], camera-to-world [V 4 4], float32; None where it is not known."""
        ...

    @property
    def camera_size(self) -> tuple[int, int] | None:
        """(height, width) of the images that `camera` is for; None: use it as it is."""
        ...

    def load(self, ids: np.ndarray) -> Starts:
        """Return the starts named by `ids`, int64 [B], repeats allowed."""
        ...


def make_initial_states(kind: str, path: str = "") -> InitialStates:
    """Build a source.

    Args:
        kind: a key of `INITIAL_STATES`.
        path: folder that the source reads; "" = it reads none.

    Raises:
        ConfigError: for an unknown kind, a folder that is missing, or one that is of no use.
    """
    if kind not in INITIAL_STATES:
        raise ConfigError(f"initial_states: expected one of {sorted(INITIAL_STATES)}, got {kind!r}")
    module, name = INITIAL_STATES[kind].split(":")
    source = getattr(importlib.import_module(module), name)
    reads = "folder" in inspect.signature(source).parameters
    if reads != bool(path):
        expected = "the folder to read" if reads else "none"
        raise ConfigError(f"initial_states_path: {kind!r} expected {expected}, got {path!r}")
    return source(path) if reads else source()


class _StoredStarts:
    """Starts held in memory; one frame per episode, so a thousand of 256x256 take 200 MB."""

    camera_size: tuple[int, int] | None = None

    def __init__(
        self,
        images: np.ndarray,
        poses: np.ndarray,
        instructions: list[str],
        camera: Matrices | None,
    ):
        self.camera = camera
        self.instructions = tuple(dict.fromkeys(instructions))
        index = {text: i for i, text in enumerate(self.instructions)}
        self._images, self._poses = images, poses
        self._task = np.array([index[text] for text in instructions], np.int32)
        self.num_starts = len(instructions)

    def load(self, ids: np.ndarray) -> Starts:
        """Return the starts named by `ids`, int64 [B]."""
        ids = checked_ids(ids, self.num_starts)
        return Starts(self._images[ids], self._poses[ids], self._task[ids])


class NpyStarts(_StoredStarts):
    """Start frames in a folder: RLinf's `.npy` episodes, or packed ones.

    An RLinf file is an object array of one dict per frame. These entries of frame 0 are read:
    `image` (uint8 [H W 3] or [V H W 3]), the pose `init_ee_pose` (else `state`, else `abs_action`;
    8 numbers), and `instruction` or `task` (str or bytes). The arrays are pickles, so they go
    through an unpickler that admits numpy arrays and plain builtins and runs nothing else. The
    files do not record their camera; a single view is taken to be the reference's fixed one, and
    the log says so.
    Keyframe files, with `_kir` in their names, are left out: see `NpyKeyframes`.

    A packed folder, as `pack_starts` writes it, is plain arrays and knows its camera.

    Raises:
        DataError: for a missing or empty folder, a refused or damaged file, a missing field, a
            pose or picture of another meaning, or frames of several sizes; names every file at
            fault, up to ten.

    Source: data layout of RLinf `EvacEnv` (revision c9f1d8471). Differences: 1. a missing pose
    is an error, there a single zero is used; 2. every file is checked at start-up, there the first.
    """

    def __init__(self, folder: str):
        if is_packed(folder):
            images, poses, instructions, camera, self.camera_size = _packed(Path(folder))
        else:
            paths = episode_files(folder)
            if not paths:
                late = keyframe_files(folder)
                only = f"{len(late)} keyframe files only" if late else "none"
                raise DataError(
                    f"expected *.npy episodes in {folder!r}, found {only}; "
                    "set config.env.initial_states_path to the folder that holds them"
                )
            images, poses, instructions = _read_all(paths, first_frame, folder)
            camera = None
            if images.shape[1] == 1:
                camera = libero_camera()
                logging.warning(
                    "%s: the files do not tell their camera; it is taken to be RLinf's fixed one "
                    "for LIBERO. If it is another one, state it: make the starts anew by "
                    "tools.episodes.import_starts or import_rlinf, with --camera",
                    folder,
                )
        super().__init__(images, poses, instructions, camera)


class NpyKeyframes(_StoredStarts):
    """Keyframes as RLinf stores them: `*_kir*.npy` files that end at the frame to begin at.

    Image and pose (`state`, else `abs_action`) are the last frame's, the instruction is the first
    one's. Like every start they are a single frame: the frames before it are not given to the
    world model as its history.

    Attributes:
        count: keyframes; they are named KEYFRAMES .. KEYFRAMES + count - 1, in order of names.
        instructions: every one that occurs, each once.

    Raises:
        DataError: see `NpyStarts`.

    Source: file names and frame order of RLinf's keyframe-initialised rollouts.
    """

    def __init__(self, folder: str):
        paths = keyframe_files(folder)
        if not paths:
            raise DataError(f"expected *{KEYFRAME_MARK}*.npy files in {folder!r}, found none")
        super().__init__(*_read_all(paths, last_frame, folder), camera=None)
        self.count = self.num_starts

    def load(self, ids: np.ndarray) -> Starts:
        """Return the keyframes named by `ids`, int64 [B]."""
        return super().load(np.asarray(ids, np.int64) - KEYFRAMES)


def pack_starts(source: InitialStates, ids: np.ndarray, folder: Path, **facts) -> None:
    """Write the starts named by `ids`, int64 [N], as a folder that `NpyStarts` reads.

    Args:
        folder: must not exist; it appears when it is whole.
        facts: for the card.

    Raises:
        DataError: `folder` exists.
    """
    if folder.exists():
        raise DataError(f"{folder} exists; choose another folder or remove it")
    starts = source.load(ids)
    camera = None
    if source.camera is not None:
        camera = {
            "intrinsic": source.camera[0].tolist(),
            "c2w": source.camera[1].tolist(),
            "size": source.camera_size,
        }
    card = {"instructions": list(source.instructions), "camera": camera, **facts}
    named = {IMAGES_FILE: starts.images, POSES_FILE: starts.poses, TASKS_FILE: starts.task}
    with whole_folder(folder) as partial:
        partial.mkdir()
        for name, array in named.items():
            np.save(partial / name, array, allow_pickle=False)
        cards.write_json(partial / CARD_FILE, card)


def _packed(folder: Path):
    """Images, poses, instructions, camera and its size of a packed folder."""
    try:
        images, poses, tasks = (
            load_array(folder / name) for name in (IMAGES_FILE, POSES_FILE, TASKS_FILE)
        )
        card = json.loads((folder / CARD_FILE).read_text())
        if tasks.min(initial=0) < 0:
            raise ValueError("a task is negative")
        texts = [card["instructions"][task] for task in tasks]
        camera, size = card["camera"], None
        if camera is not None:
            size = tuple(camera["size"]) if camera["size"] else None
            camera = np.array(camera["intrinsic"], np.float32), np.array(camera["c2w"], np.float32)
    except (OSError, KeyError, ValueError, TypeError, IndexError, EOFError) as error:
        raise DataError(f"cannot read packed initial states in {folder}: {error!r}") from error
    problems = {
        f"images uint8 [N V H W 3], got {images.dtype} {list(images.shape)}": (
            images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3
        ),
        f"poses [{len(images)} 8], got {list(poses.shape)}": (
            poses.shape != (len(images), POSE_DIM)
        ),
        f"as many tasks as images, got {len(texts)} and {len(images)}": (
            len(texts) != len(images) or not texts
        ),
    }
    if wrong := [text for text, is_wrong in problems.items() if is_wrong]:
        raise DataError(f"{folder}: expected " + "; ".join(wrong))
    for n, image in enumerate(images):
        meaning.check_frame(image, f"{folder}: start {n}")
    return images, meaning.check_poses(poses, str(folder)), texts, camera, size


class StartCycle:
    """Endless seeded order of start ids: every round visits all of `ids` [n] once, shuffled."""

    def __init__(self, ids: np.ndarray, seeds: tuple[int, ...]):
        self._ids, self._rng = np.asarray(ids, np.int64), np.random.default_rng(seeds)
        self._rest = np.zeros(0, np.int64)

    def next(self, count: int) -> np.ndarray:
        """Return the next `count` ids, int64."""
        while len(self._rest) < count:
            self._rest = np.concatenate((self._rest, self._rng.permutation(self._ids)))
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def first_frame(path: Path) -> Start:
    """Return image, pose and instruction of an episode's frame 0."""
    episode = _episode(path)
    return _start(path, episode, 0, ("init_ee_pose", "state", "abs_action"))


def last_frame(path: Path) -> Start:
    """Return image and pose of an episode's last frame, and the instruction of its first one."""
    episode = _episode(path)
    # "init_ee_pose" is the pose that the episode began with, wherever it stands.
    return _start(path, episode, len(episode) - 1, ("state", "abs_action"))


def _episode(path: Path) -> np.ndarray:
    episode = load_objects(path)
    if episode.ndim != 1 or not len(episode) or not isinstance(episode[0], dict):
        raise DataError(f"{path}: expected an array of one dict per frame")
    return episode


def _start(path: Path, episode: np.ndarray, n: int, pose_keys: tuple[str, ...]) -> Start:
    frame = episode[n]
    if not isinstance(frame, dict):
        raise DataError(f"{path}: frame {n} is no dict")
    image = np.asarray(frame.get("image"))
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise DataError(
            f"{path}: frame {n} needs 'image' as uint8 [H W 3], got {image.dtype} {image.shape}"
        )
    meaning.check_frame(image, f"{path}: frame {n}")
    key = next((k for k in pose_keys if k in frame), None)
    pose = np.asarray(frame[key]).reshape(-1) if key else np.zeros(0)
    if pose.shape != (POSE_DIM,) or pose.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: frame {n} needs {pose_keys[0]!r} as 8 numbers [{meaning.POSE}], got "
            f"{key or 'nothing'} of shape {pose.shape}"
        )
    pose = meaning.check_poses(pose[None], f"{path}: frame {n}: {key!r}")[0]
    text_key = "instruction" if "instruction" in episode[0] else "task"
    text = episode[0].get(text_key)
    if str(frame.get(text_key, text)) != str(text):
        raise DataError(
            f"{path}: {text_key!r} changes within the episode, from {text!r} to "
            f"{frame[text_key]!r}; split the file first"
        )
    text = text.item() if isinstance(text, np.ndarray | np.generic) else text
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: frame 0 needs 'instruction' (or 'task') as text, got {text!r}")
    # A copy, because a view of one frame could keep the whole episode alive.
    image = np.array(image if image.ndim == 4 else image[None])
    return image, pose, text.strip()


def _read_all(
    paths: Sequence[Path], read: Callable[[Path], Start], folder: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images [N V H W 3], poses [N 8] and instructions of files; one error for all that fail."""
    starts, problems = [], []
    for path in paths:
        try:
            starts.append(read(path))
        except DataError as error:
            problems.append(str(error))
    if not problems:
        sizes = [image.shape for image, _, _ in starts]
        usual = max(set(sizes), key=sizes.count)
        odd = [(p.name, s) for p, s in zip(paths, sizes, strict=True) if s != usual]
        problems += [f"{name}: frame {size}, most are {usual}; use one size" for name, size in odd]
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        told = problems[:PROBLEMS_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        raise DataError(f"initial states in {folder!r}:\n" + "\n".join(told))
    images, poses, instructions = zip(*starts, strict=True)
    return np.stack(images), np.stack(poses), list(instructions)


def checked_ids(ids: np.ndarray, num_starts: int) -> np.ndarray:
    """Return `ids` as int64 [n].

    Raises:
        DataError: no vector, or an id outside 0..num_starts-1.
    """
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or (len(ids) and not (ids.min() >= 0 and ids.max() < num_starts)):
        got = f"shape {ids.shape}" if ids.ndim != 1 else f"{ids.min()}..{ids.max()}"
        raise DataError(f"start ids: expected a vector within 0..{num_starts - 1}, got {got}")
    return ids
