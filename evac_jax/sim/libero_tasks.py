"""LIBERO's suites: their tasks, initial states and cameras. NumPy only, nothing of LIBERO itself.

A start id is a task and an initial state: id % number of tasks is the task, id // number of tasks
the state. So the first ids contain every task once, and 500 ids cover a suite of 10 x 50.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evac_jax.config.libero_files import ALL_ENDINGS, LiberoFiles, instruction_of
from evac_jax.errors import DataError
from evac_jax.files.restricted_npy import unpickle
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


def load_suite(
    name: str, files: LiberoFiles, chosen: Sequence[int] = (), extra_states: bool = False
) -> Suite:
    """Return a suite: tasks in the benchmark's order, and the initial states that come with it.

    Args:
        name: of the suite.
        files: where they lie.
        chosen: numbers of the tasks that are wanted, in this order; () = all.
        extra_states: number those that the benchmark left out behind its own.

    Raises:
        ConfigError: LIBERO's table of tasks cannot be read.
        DataError: a file of states is missing or damaged, or asks for more than NumPy.
    """
    known = files.tasks(name)
    tasks = tuple(known[task] for task in chosen) or tuple(known)
    states = tuple(read_states(files.states_file(name, task)) for task in tasks)
    if extra_states:
        every = (read_states(files.states_file(name, task, ALL_ENDINGS)) for task in tasks)
        states = tuple(_with_others(*both) for both in zip(states, every, strict=True))
    _check(name, tasks, states)
    return Suite(name, tasks, states)


def _with_others(first: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Return `first` [n d] and behind it what else `every` [m d] has."""
    known = {state.tobytes() for state in first}
    return np.concatenate([first, [state for state in every if state.tobytes() not in known]])


def read_states(path: Path) -> np.ndarray:
    """Return a task's initial states, float64 [n d].

    Args:
        path: `.npz` with the key "states"; or a torch file as LIBERO's repository has them, whose
            pickle goes through an unpickler that admits NumPy only.

    Raises:
        DataError: the file is missing or damaged, or its pickle asks for more than NumPy.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                return stored["states"]
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = archive.read(name)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable file of initial states: {error!r}") from error
    states = unpickle(io.BytesIO(content), path)
    if not isinstance(states, np.ndarray):
        raise DataError(f"{path}: expected an array of states, got {type(states).__name__}")
    return states


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
    fovy: float,
    position: Sequence[float],
    rotation: Sequence[float],
    size: int,
    crop: Sequence[float] = (0.0, 1.0, 0.0, 1.0),
) -> Matrices:
    """Return intrinsic [1 3 3] and camera-to-world [1 4 4] of the frames as they are handed over.

    MuJoCo's cameras look along -Z with Y up. LIBERO's frames come bottom row first and are turned
    by 180 degrees, which leaves the upright view mirrored: hence the negative focal length in x.

    Args:
        fovy: vertical field of view of the whole picture, degrees.
        position: of the camera in the world, metres [3].
        rotation: camera to world in MuJoCo's axes, row by row [9].
        size: height and width of the frames, pixels.
        crop: left, right, top and bottom of what they show, as shares of the whole picture.
    """
    left, right, top, bottom = crop
    focal = 0.5 / np.tan(np.radians(fovy) / 2)  # in heights of the whole picture
    x, y = size / (right - left), size / (bottom - top)  # pixels that it would have
    intrinsic = np.array(
        [[-focal * x, 0, (0.5 - left) * x], [0, focal * y, (0.5 - top) * y], [0, 0, 1]]
    )
    c2w = np.eye(4)
    c2w[:3, :3] = np.reshape(rotation, (3, 3)) * [1, -1, -1]
    c2w[:3, 3] = position
    return intrinsic[None].astype(np.float32), c2w[None].astype(np.float32)
