"""Recorded episodes on disk: plain `.npy` files, one per field, and a data card.

`.npy` because it can be mapped into memory: training reads a few frames of each episode at random
and never needs all of them at once. NumPy only, no pickle.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evac_jax.errors import DataError

META = "meta.json"


@dataclass
class Episodes:
    """N episodes of T actions.

    Attributes:
        frames: uint8 [N T+1 H W 3]; frame t is what action t is decided on.
        actions: what the simulator executed, float32 [N T 7], gripper -1 open, +1 closed.
        poses: xyz (m), quaternion xyzw, opening 0..1 at every frame, float32 [N T+1 8].
        success: task done in the frame, bool [N T+1].
        task: index into the instructions of the data card, int32 [N].
        source: index into the data card's "sources", int32 [N].
        intrinsic: [3 3] at the frames' size, float32.
        c2w: camera to world, +Z forward, [4 4] float32.
        meta: the data card.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    success: np.ndarray
    task: np.ndarray
    source: np.ndarray
    intrinsic: np.ndarray
    c2w: np.ndarray
    meta: dict = dataclasses.field(default_factory=dict)

    @property
    def num_episodes(self) -> int:
        """Episodes, N."""
        return len(self.actions)

    def __getitem__(self, rows: slice) -> "Episodes":
        per_episode = {name: getattr(self, name)[rows] for name in _PER_EPISODE}
        return dataclasses.replace(self, **per_episode)

    def split(self, held_out: float = 0.1) -> tuple["Episodes", "Episodes"]:
        """Return training and held-out episodes; the last ones are held out.

        The recorder shuffles the sources over the file, so both parts have the same mixture.
        """
        first = self.num_episodes - max(1, round(self.num_episodes * held_out))
        return self[:first], self[first:]


_PER_EPISODE = ("frames", "actions", "poses", "success", "task", "source")
_SHARED = ("intrinsic", "c2w")


def create(folder: Path, count: int, steps: int, image_size: int) -> dict[str, np.ndarray]:
    """Return one writable array mapped to a new file per field of `Episodes`."""
    shapes = {
        "frames": ((count, steps + 1, image_size, image_size, 3), np.uint8),
        "actions": ((count, steps, 7), np.float32),
        "poses": ((count, steps + 1, 8), np.float32),
        "success": ((count, steps + 1), np.bool_),
        "task": ((count,), np.int32),
        "source": ((count,), np.int32),
        "intrinsic": ((3, 3), np.float32),
        "c2w": ((4, 4), np.float32),
    }
    folder.mkdir(parents=True)
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, (shape, dtype) in shapes.items()
    }


def load(folder: str | Path, *more: str | Path) -> Episodes:
    """Return the episodes of a folder, mapped into memory, read-only.

    With several folders their episodes are copied into memory, one folder after another.

    Raises:
        DataError: a file is missing or damaged, or the folders do not fit together.
    """
    parts = [_load_one(Path(name)) for name in (folder, *more)]
    first = parts[0]
    if len(parts) == 1:
        return first
    for name, part in zip(more, parts[1:], strict=True):
        for field in (*_PER_EPISODE, *_SHARED):
            one, other = getattr(first, field), getattr(part, field)
            same = one.shape[1:] == other.shape[1:]
            if not same or (field in _SHARED and not np.array_equal(one, other)):
                raise DataError(f"{name}: {field} does not fit that of {folder}; record both alike")
    joined = {f: np.concatenate([getattr(part, f) for part in parts]) for f in _PER_EPISODE}
    # One permutation for all, so that `split` holds out some of every folder.
    order = np.random.default_rng(0).permutation(len(joined["task"]))
    return dataclasses.replace(first, **{f: values[order] for f, values in joined.items()})


def _load_one(folder: Path) -> Episodes:
    try:
        meta = json.loads((folder / META).read_text())
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _PER_EPISODE
        }
        shared = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _SHARED}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: not a complete recording ({error}); "
            "make one with python -m evac_jax.tools.collect"
        ) from error
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"{folder}: fields disagree about the number of episodes: {counts}")
    return Episodes(**arrays, **shared, meta=meta)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every array file in `folder`, by name."""
    result = {}
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as stream:
            result[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return result
