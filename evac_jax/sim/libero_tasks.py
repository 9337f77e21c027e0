"""LIBERO's suites: their tasks, initial states and cameras. NumPy only, nothing of LIBERO itself.

A start id is a task and an initial state: id % number of tasks is the task, id // number of tasks
the state. So the first ids contain every task once, and 500 ids cover a suite of 10 x 50.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evac_jax.errors import DataError
from evac_jax.files.atomic import replacing
from evac_jax.sim.camera import Matrices

HELD_OUT = 0.1  # share of the initial states, the last ones, that no training sees
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Suite:
    """Tasks of one suite, in the benchmark's order.

    Attributes:
        name: such as "libero_spatial".
        tasks: names; <name>.bddl describes the task.
        states: MuJoCo states that episodes begin in, float64 [n d] per task; n is common.
    """

    name: str
    tasks: tuple[str, ...]
    states: tuple[np.ndarray, ...]

    @property
    def instructions(self) -> tuple[str, ...]:
        """Instructions for the policy, one per task."""
        return tuple(instruction_of(task) for task in self.tasks)

    @property
    def num_starts(self) -> int:
        """Number of start ids."""
        return len(self.tasks) * len(self.states[0])

    def locate(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return task and number of the initial state of start ids, both int64 [n].

        Raises:
            DataError: there is no such id.
        """
        starts = np.asarray(starts, np.int64)
        if ((starts < 0) | (starts >= self.num_starts)).any():
            raise DataError(f"start ids of {self.name}: expected 0..{self.num_starts - 1}, got "
                            f"{starts}")  # fmt: skip
        return starts % len(self.tasks), starts // len(self.tasks)

    def is_held_out(self, starts: np.ndarray) -> np.ndarray:
        """Return which start ids are held out, bool [n]: those of every task's last states.

        Pictures cannot tell: the same start may differ in a few pixels when it is repeated.
        """
        return self.locate(starts)[1] >= round(len(self.states[0]) * (1 - HELD_OUT))

    def spread(self, starts: np.ndarray) -> np.ndarray:
        """Return start ids [n] in an order whose every stretch has states of the whole range.

        Tasks stay in their order, so that each can keep a process of its own. So held-out states
        are among few episodes too, and among those of every player.
        """
        states, which = np.unique(self.locate(starts)[1], return_inverse=True)
        # Multiples of the golden ratio fill [0, 1) evenly; the n-th smallest is that of state n.
        turn = np.argsort(np.arange(len(states)) * _GOLDEN % 1.0)
        return np.asarray(starts)[np.argsort(turn[which], kind="stable")]


def instruction_of(task: str) -> str:
    """Return a task's name as a sentence, without the scene's name in front.

    Source: LIBERO's benchmark takes the sentence from the file name, too (revision 8f1084e).
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def load_suite(file: Path) -> Suite:
    """Return the suite that `save_suite` wrote.

    Raises:
        DataError: the file is missing, damaged, or no suite.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            tasks = tuple(str(task) for task in stored["tasks"])
            states = tuple(stored[f"states_{n}"] for n in range(len(tasks)))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{file}: not a suite's initial states ({error}); make it by python -m "
            "evac_jax.tools.episodes.import_libero_states"
        ) from error
    _check(file.stem, tasks, states)
    return Suite(file.stem, tasks, states)


def save_suite(file: Path, tasks: Sequence[str], states: Sequence[np.ndarray]) -> None:
    """Write a suite as `.npz`: `tasks`, and `states_<n>` of task n; whole or not at all.

    Raises:
        DataError: the states are not those of a suite.
    """
    _check(file.stem, tasks, states)
    arrays = {f"states_{n}": array for n, array in enumerate(states)}
    with replacing(file) as temporary:
        np.savez_compressed(temporary, tasks=np.array(tasks, np.str_), **arrays)


def _check(name: str, tasks: Sequence[str], states: Sequence[np.ndarray]) -> None:
    if not tasks or len(tasks) != len(states):
        raise DataError(f"{name}: {len(tasks)} tasks, but initial states for {len(states)}")
    for task, array in zip(tasks, states, strict=True):
        if array.dtype != np.float64 or array.ndim != 2 or not np.isfinite(array).all():
            raise DataError(
                f"{name}: {task}: expected initial states as finite float64 [n d], got "
                f"{array.dtype} {list(array.shape)}"
            )
    counts = {len(array) for array in states}
    if len(counts) > 1 or 0 in counts:
        raise DataError(f"{name}: expected as many initial states for every task, got {counts}")


def camera_matrices(
    fovy: float, position: Sequence[float], rotation: Sequence[float], size: int
) -> Matrices:
    """Return intrinsic [1 3 3] and camera-to-world [1 4 4] of the frames as they are handed over.

    MuJoCo's cameras look along -Z with Y up. LIBERO's frames come bottom row first and are turned
    by 180 degrees, which leaves the upright view mirrored: hence the negative focal length in x.

    Args:
        fovy: vertical field of view, degrees.
        position: of the camera in the world, metres [3].
        rotation: camera to world in MuJoCo's axes, row by row [9].
        size: height and width, pixels.
    """
    focal = size / 2 / np.tan(np.radians(fovy) / 2)
    intrinsic = np.array([[-focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    c2w = np.eye(4)
    c2w[:3, :3] = np.reshape(rotation, (3, 3)) * [1, -1, -1]
    c2w[:3, 3] = position
    return intrinsic[None].astype(np.float32), c2w[None].astype(np.float32)
