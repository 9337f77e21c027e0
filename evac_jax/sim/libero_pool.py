"""Several LIBERO environments side by side, each in a process of its own. No torch, no JAX.

Processes begin when they are first needed, so a pool that is never used costs nothing.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.config.libero import LiberoConfig
from evac_jax.errors import SimulatorError
from evac_jax.sim import libero_worker
from evac_jax.sim.camera import Matrices, libero_camera
from evac_jax.sim.libero_tasks import Suite, camera_matrices, load_suite

TAIL_BYTES = 4000  # of a process's output that an error quotes
_ROOT = Path(__file__).resolve().parents[2]  # holds the package that the processes import
_END_S = 5.0  # a process that was told to end gets this long


class MujocoProcess:
    """One environment as seen from outside. Starting does not wait for it."""

    def __init__(self, config: LiberoConfig, assets: Path, paths: str):
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.task = ""
        python_path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(config.python or sys.executable, "-m", "evac_jax.sim.libero_worker"),
                    f"--connection={theirs.fileno()}",
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                # A process group with its parent: the trainer's kill reaches all of them.
                env=os.environ
                | {
                    "PYTHONPATH": python_path,
                    "LIBERO_CONFIG_PATH": paths,
                    "MUJOCO_GL": config.renderer,
                    "PYOPENGL_PLATFORM": config.renderer,
                    "OMP_NUM_THREADS": "1",
                },
            )
        self.connection = Connection(ours.detach())
        self.exit_fd = os.pidfd_open(self._process.pid)
        drawing = ("image_size", "crop", "oversample", "reflections")
        settings = (*drawing, "action_repeat", "wait_steps")
        self.send(assets=str(assets), **{name: getattr(config, name) for name in settings})

    def send(self, **message: Any) -> None:
        """Send a request.

        Raises:
            SimulatorError: the process is gone.
        """
        try:
            libero_worker.send(self.connection, message)
        except OSError:
            self.receive()  # its last message, or an end of file
            raise self._death() from None

    def receive(self) -> tuple[dict[str, Any], np.ndarray]:
        """Return the answer and its frames; waits for it.

        Raises:
            SimulatorError: the process failed or is gone; quotes its traceback or its output.
        """
        wait([self.connection, self.exit_fd])
        try:
            if not self.connection.poll():  # a message sent before death counts
                raise EOFError
            message, frames = libero_worker.receive(self.connection)
        except (EOFError, OSError):
            raise self._death() from None
        if "error" in message:
            raise SimulatorError(
                f"LIBERO process {self._process.pid}, {self.task or 'no task yet'}: "
                f"{message['error']}\n--- its traceback ---\n{message['traceback']}"
            )
        return message, frames

    def _death(self) -> SimulatorError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        status = self._process.poll()
        how = f"exited with status {status}"
        if status is None:
            how = "closed its pipe"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        fd = self._log.fileno()
        size = os.fstat(fd).st_size
        tail = os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace").strip()
        return SimulatorError(
            f"LIBERO process {self._process.pid}, {self.task or 'no task yet'}: {how}; expected an "
            f"answer\n--- end of its output ---\n{tail or '(it printed nothing)'}"
        )

    def close(self) -> None:
        """End the process: it leaves when its socket closes, or is killed."""
        self.connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.exit_fd)
        self._log.close()


@dataclass(frozen=True)
class Played:
    """One environment's part of a chunk of k actions of the policy.

    Attributes:
        frames: uint8 [k 1 H W 3] where it was filmed, else only the last [1 1 H W 3]; none [0 ..]
            if it was played blind.
        poses: float32 [k 8] after each action: xyz (m), quaternion xyzw, gripper opening 0..1.
        success: bool [k] after each action.
        objects: xyz (m) of the n objects that were followed, after each action; float32 [k n 3].
    """

    frames: np.ndarray
    poses: np.ndarray
    success: np.ndarray
    objects: np.ndarray


def _played(message: dict[str, Any], frames: np.ndarray) -> Played:
    return Played(
        frames=frames[:, None],
        poses=np.array(message["poses"], np.float32),
        success=np.array(message["success"], bool),
        objects=np.array(message["objects"], np.float32).reshape(len(message["success"]), -1, 3),
    )


class LiberoPool:
    """Environments that are started and played by their numbers, 0..num_envs-1.

    Building a task's environment takes seconds. Therefore a number is not tied to a process: a
    process that already holds the task plays it.
    """

    def __init__(self, config: LiberoConfig, num_envs: int):
        self._files = config.files
        self.suite: Suite = load_suite(config.suite, self._files, config.tasks, config.extra_states)
        self.bddl_files = self._files.root / "bddl_files"
        self._camera: Matrices | None = None  # of the first episode
        self.one_camera = True  # so far; LIBERO's scenes may differ in theirs
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="evac_jax_libero_")
        self._write_paths(Path(self._folder.name))
        self._processes: list[MujocoProcess | None] = [None] * num_envs
        self._seat = np.arange(num_envs)  # environment -> process

    @property
    def camera(self) -> Matrices:
        """The camera of the first episode.

        Raises:
            SimulatorError: none has begun; the simulator knows where its camera is, nobody else.
        """
        if self._camera is None:
            raise SimulatorError("LIBERO's camera is known after the first start")
        return self._camera

    def _write_paths(self, folder: Path) -> None:
        """Write LIBERO's config.yaml (JSON is YAML); without one its import waits for a person."""
        files = self._files
        paths = {
            "benchmark_root": files.root,
            "assets": files.assets,
            "bddl_files": files.root / "bddl_files",
            "init_states": files.states,
            "datasets": files.root,
        }
        text = json.dumps({name: str(path.resolve()) for name, path in paths.items()})
        (folder / "config.yaml").write_text(text)

    def start(self, envs: Sequence[int], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin episodes in environments `envs` [n] from start ids [n].

        Returns:
            frames uint8 [n 1 H W 3] and poses float32 [n 8].

        Raises:
            SimulatorError: a process failed or died.
        """
        tasks, numbers = self.suite.locate(starts)
        answers = self._begin(
            envs,
            [self.suite.tasks[task] for task in tasks],
            [self.suite.states[task][n] for task, n in zip(tasks, numbers, strict=True)],
            [self._config.seed + int(n) for n in numbers],
        )
        poses = np.array([message["pose"] for message, _ in answers], np.float32)
        return np.stack([frames for _, frames in answers]), poses.reshape(len(answers), 8)

    def play(
        self,
        envs: Sequence[int],
        actions: Sequence[np.ndarray],
        film: Sequence[bool],
        *,
        blind: bool = False,
        follow: Sequence[Sequence[str]] | None = None,
    ) -> list[Played]:
        """Play actions [k 7] in each of `envs`, k >= 1 of each its own; in the sense of LIBERO.

        Args:
            film: which environments return a frame for every action.
            blind: none returns any, not even the last one.
            follow: names of the objects to follow in each of `envs`, as `look` has them.

        Raises:
            SimulatorError: a process failed or died.
        """
        names = follow or [()] * len(envs)
        for env, moves, filmed, mine in zip(envs, actions, film, names, strict=True):
            # As float64: LIBERO computes in it, and the same numbers must come out of a recording.
            self._process(env).send(
                do="play", actions=moves.tolist(), film=bool(filmed), blind=blind, follow=list(mine)
            )
        return [_played(*answer) for answer in self._gather(envs)]

    def look(self, envs: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return where everything is in `envs`: name -> xyz (m), quaternion xyzw, float64 [7].

        Names are those of the task's `.bddl` file. No camera tells this; scripted players need it.

        Raises:
            SimulatorError: a process failed or died.
        """
        for env in envs:
            self._process(env).send(do="look")
        answers = [message["places"] for message, _ in self._gather(envs)]
        return [{name: np.array(place) for name, place in seen.items()} for seen in answers]

    def show(
        self, task: str, states: np.ndarray, fixtures: Mapping[str, Sequence[float]]
    ) -> Played:
        """Return MuJoCo states [k d] of one of the suite's tasks as they are, in environment 0.

        Args:
            fixtures: where bodies that no state moves stand: body -> xyz (m), quaternion wxyz; the
                others stand where LIBERO's random numbers put them.

        Raises:
            SimulatorError: the process failed or died.
        """
        self._begin([0], [task], [states[0]], [self._config.seed])
        self._process(0).send(
            do="show",
            states=states.tolist(),
            fixtures={body: list(place) for body, place in fixtures.items()},
        )
        return _played(*self._gather([0])[0])

    def _begin(
        self,
        envs: Sequence[int],
        tasks: Sequence[str],
        states: Sequence[np.ndarray],
        seeds: Sequence[int],
    ) -> list[tuple[dict[str, Any], np.ndarray]]:
        names = [f"{self.suite.name}/{task}" for task in tasks]
        self._seat_by_task(envs, names)
        for env, name, task, state, seed in zip(envs, names, tasks, states, seeds, strict=True):
            process = self._process(env)
            process.task = name
            bddl = str(self._files.bddl(self.suite.name, task).resolve())
            process.send(do="start", task=bddl, state=state.tolist(), seed=seed)
        answers = self._gather(envs)
        for message, _ in answers:
            self._note_camera(message["camera"])
        return answers

    def _process(self, env: int) -> MujocoProcess:
        seat = self._seat[env]
        if self._processes[seat] is None:
            self._processes[seat] = MujocoProcess(
                self._config, self._files.assets.resolve(), self._folder.name
            )
        return self._processes[seat]

    def _seat_by_task(self, envs: Sequence[int], names: Sequence[str]) -> None:
        """Give each environment a process that holds its task, as far as there are any."""
        free = [int(self._seat[env]) for env in envs]
        waiting = []
        for env, name in zip(envs, names, strict=True):
            held = (s for s in free if (p := self._processes[s]) is not None and p.task == name)
            if (seat := next(held, None)) is None:
                waiting.append(env)
            else:
                free.remove(seat)
                self._seat[env] = seat
        for env, seat in zip(waiting, free, strict=True):
            self._seat[env] = seat

    def _gather(self, envs: Sequence[int]) -> list[tuple[dict[str, Any], np.ndarray]]:
        """Return the answers of `envs` in their order; a death anywhere is noticed at once."""
        waiting = {env: self._process(env) for env in envs}
        answers = {}
        while waiting:
            handles = [h for p in waiting.values() for h in (p.connection, p.exit_fd)]
            ready = set(wait(handles))
            for env, process in list(waiting.items()):
                if process.connection in ready or process.exit_fd in ready:
                    answers[env] = process.receive()
                    del waiting[env]
        return [answers[env] for env in envs]

    def _note_camera(self, told: dict[str, Any]) -> None:
        camera = libero_camera()
        if self._config.camera == "true":
            camera = camera_matrices(**told, size=self._config.image_size, crop=self._config.crop)
        self._camera = self._camera or camera
        pairs = zip(self._camera, camera, strict=True)
        self.one_camera &= all(np.allclose(a, b, atol=1e-5) for a, b in pairs)

    def close(self) -> None:
        """End every process."""
        processes = [process for process in self._processes if process is not None]
        for process in processes:
            process.connection.close()  # all of them leave at once
        for process in processes:
            process.close()
        self._processes = [None] * len(self._processes)
        self._folder.cleanup()
