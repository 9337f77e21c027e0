"""First frames, poses and instructions that imagined episodes start from.

A source names its starts 0..num_starts-1 and loads any of them as a batch. Sources are listed in
`INITIAL_STATES` as lazy import strings, so a new one is a class and a line.
"""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from evac_jax.errors import ConfigError, DataError
from evac_jax.sim.camera import Matrices, libero_camera
from evac_jax.sim.restricted_npy import load_objects

INITIAL_STATES = {
    "npy": "evac_jax.sim.initial_states:NpyStarts",
    "recording": "evac_jax.sim.recorded_starts:FolderStarts",
    "npz": "evac_jax.sim.initial_states:NpzStarts",
    "miniature": "evac_jax.sim.initial_states:MiniatureStarts",
}
POSE_DIM = 8


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
        camera: intrinsic [V 3 3] and camera-to-world [V 4 4] float32, or None where the source
            does not know its camera.
        camera_size: (height, width) of the images that `camera` is for; None if its intrinsics
            are to be used as they are.
    """

    num_starts: int
    instructions: tuple[str, ...]
    camera: Matrices | None
    camera_size: tuple[int, int] | None

    def load(self, ids: np.ndarray) -> Starts:
        """Return the starts named by `ids`, int64 [B], repeats allowed."""
        ...


def make_initial_states(config: dict) -> InitialStates:
    """Build the source `config["kind"]`; the other entries are its arguments.

    Raises:
        ConfigError: for an unknown kind or argument.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in INITIAL_STATES:
        raise ConfigError(
            f"initial_states.kind: expected one of {sorted(INITIAL_STATES)}, got {kind!r}"
        )
    module, name = INITIAL_STATES[kind].split(":")
    source = getattr(importlib.import_module(module), name)
    try:
        inspect.signature(source).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"initial_states of kind {kind!r}: {error}") from error
    return source(**arguments)


class _StoredStarts:
    """Starts held in memory; one frame per episode, so a thousand of 256x256 take 200 MB."""

    camera_size = None

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
        ids = _checked_ids(ids, self.num_starts)
        return Starts(self._images[ids], self._poses[ids], self._task[ids])


class NpyStarts(_StoredStarts):
    """Frame 0 of every episode in a folder of RLinf's `.npy` files, in order of their names.

    A file is an object array of one dict per frame. Read are `image` (uint8 [H W 3], or [V H W 3]),
    the pose `init_ee_pose` (else `state`, else `abs_action`; 8 numbers) and `instruction` or
    `task` (str or bytes). The arrays are pickles, so they go through an unpickler that admits
    numpy arrays and plain builtins and runs nothing else. The files do not record their camera;
    a single view is taken to be the reference's fixed one.

    Raises:
        DataError: for a missing or empty folder, a refused or damaged file, a missing field, or
            frames of several sizes; names every file at fault, up to ten.

    Source: data layout of RLinf `EvacEnv` (revision c9f1d8471). Differences: 1. no pose means an
    error, there a single zero is used; 2. every file is checked at start-up, there the first.
    """

    def __init__(self, folder: str):
        paths = sorted(Path(folder).glob("*.npy"))
        if not paths:
            raise DataError(
                f"expected *.npy episodes in {folder!r}, found none; "
                "set initial_states.folder to the folder that holds them"
            )
        starts, problems = [], []
        for path in paths:
            try:
                starts.append(first_frame(path))
            except DataError as error:
                problems.append(str(error))
        if not problems and len(shapes := {image.shape for image, _, _ in starts}) > 1:
            problems.append(f"frames differ in size: {sorted(shapes)}; resize them to one size")
        if problems:
            more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise DataError(f"initial states in {folder!r}:\n" + "\n".join(problems[:10]) + more)
        images, poses, instructions = zip(*starts, strict=True)
        images = np.stack(images)
        camera = libero_camera() if images.shape[1] == 1 else None
        super().__init__(images, np.stack(poses), list(instructions), camera)


class NpzStarts(_StoredStarts):
    """Starts in one plain `.npz` file: `images`, `poses`, `instructions` (a unicode array).

    `intrinsic` and `c2w` are its camera, if there. Much quicker to open than a folder of whole
    episodes; `save_starts` writes it.

    Raises:
        DataError: for a missing or damaged file.
    """

    def __init__(self, file: str):
        try:
            with np.load(file, allow_pickle=False) as stored:
                images, poses = stored["images"], stored["poses"]
                instructions = [str(text) for text in stored["instructions"]]
                has_camera = "intrinsic" in stored and "c2w" in stored
                camera = (stored["intrinsic"], stored["c2w"]) if has_camera else None
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"cannot read initial states from {file!r}: {error}") from error
        count = len(instructions)
        if images.dtype != np.uint8 or images.ndim != 5 or poses.shape != (len(images), POSE_DIM):
            raise DataError(
                f"{file}: expected images uint8 [N V H W 3] and poses [N 8], got "
                f"{images.dtype} {list(images.shape)} and {list(poses.shape)}"
            )
        if len(images) != count or count == 0:
            raise DataError(f"{file}: {len(images)} images but {count} instructions")
        super().__init__(images, poses.astype(np.float32), instructions, camera)


class MiniatureStarts:
    """Start scenes of the miniature tabletop: the start id is the scene's seed.

    Args:
        num_starts: seeds to offer; any number up to 2**62 costs nothing.
        image_size: height and width of the pictures, pixels.
    """

    def __init__(self, num_starts: int = 3_000_000, image_size: int = 64):
        # Imported here, so that an EVAC run does not need the miniature.
        from evac_jax.miniature import render, scene, tasks

        self._render, self._scene = render, scene
        self._image_size = image_size
        self.num_starts = num_starts
        self.instructions = tasks.INSTRUCTIONS
        intrinsic, c2w = render.camera(image_size)
        self.camera = intrinsic[None], c2w[None]
        self.camera_size = (image_size, image_size)

    def load(self, ids: np.ndarray) -> Starts:
        """Return the scenes named by `ids`, int64 [B]; each distinct one is drawn once."""
        ids, rows = np.unique(_checked_ids(ids, self.num_starts), return_inverse=True)
        scenes = self._scene.sample_scenes(ids)
        images = self._render.render(scenes, self._image_size)[:, None]
        return Starts(images[rows], scenes.pose[rows], scenes.task[rows])


def save_starts(source: InitialStates, ids: np.ndarray, file: str) -> None:
    """Write the starts named by `ids`, int64 [N], as one `.npz` that `NpzStarts` reads."""
    starts = source.load(ids)
    camera = {}
    if source.camera is not None:
        camera = dict(zip(("intrinsic", "c2w"), source.camera, strict=True))
    np.savez_compressed(
        file,
        images=starts.images,
        poses=starts.poses,
        instructions=np.array([source.instructions[task] for task in starts.task], np.str_),
        **camera,
    )


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


def first_frame(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Return image uint8 [V H W 3], pose float32 [8] and instruction of an episode's frame 0."""
    episode = load_objects(path)
    if episode.ndim != 1 or not len(episode) or not isinstance(episode[0], dict):
        raise DataError(f"{path}: expected an array of one dict per frame")
    frame = episode[0]
    image = np.asarray(frame.get("image"))
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise DataError(
            f"{path}: frame 0 needs 'image' as uint8 [H W 3], got {image.dtype} {image.shape}"
        )
    key = next((k for k in ("init_ee_pose", "state", "abs_action") if k in frame), None)
    pose = np.asarray(frame[key]).reshape(-1) if key else np.zeros(0)
    if pose.shape != (POSE_DIM,) or pose.dtype.kind not in "fiu" or not np.isfinite(pose).all():
        raise DataError(
            f"{path}: frame 0 needs 'init_ee_pose' as 8 finite numbers "
            f"[xyz, quaternion xyzw, gripper], got {key or 'nothing'} of shape {pose.shape}"
        )
    text = frame.get("instruction", frame.get("task"))
    text = text.item() if isinstance(text, np.ndarray | np.generic) else text
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: frame 0 needs 'instruction' (or 'task') as text, got {text!r}")
    # A copy, because a view of frame 0 could keep the whole episode alive.
    image = np.array(image if image.ndim == 4 else image[None])
    return image, pose.astype(np.float32), text.strip()


def _checked_ids(ids: np.ndarray, num_starts: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or (len(ids) and not (ids.min() >= 0 and ids.max() < num_starts)):
        raise DataError(f"start ids: expected a vector within 0..{num_starts - 1}, got {ids}")
    return ids
