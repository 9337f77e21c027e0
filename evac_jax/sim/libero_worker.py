"""One LIBERO environment in a process of its own: `python -m evac_jax.sim.libero_worker`.

Started by `evac_jax.sim.libero_pool`, never by hand, in the interpreter that has LIBERO. This file
imports NumPy and LIBERO, no torch and nothing else of evac_jax. Requests and answers are JSON on an
inherited socket, frames follow as raw bytes.

Source: behaviour of moojink/openvla-oft's LIBERO evaluation (213c5ff): rotation of the frames,
motionless actions at the start. Differences: 1. LIBERO's random numbers, which place the
fixtures, are seeded before every reset, there once per task; 2. the clocks by which robosuite
samples its cameras begin anew at every reset, there they drift by 4 ms per episode; 3. only frames
that are used are rendered. The first two make an episode independent of those before it.
"""

import argparse
import contextlib
import functools
import json
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

CAMERA = "agentview"
IMAGE = f"{CAMERA}_image"
FINGER_TRAVEL = 0.04  # metres that each of the gripper's two fingers moves
NO_MOTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # -1 keeps the gripper open


def send(connection: Connection, message: dict[str, Any], frames: np.ndarray | None = None) -> None:
    """Send a message and, behind it, frames uint8."""
    shape = None if frames is None else frames.shape
    connection.send_bytes(json.dumps(message | {"frames": shape}).encode())
    if frames is not None:
        connection.send_bytes(frames.tobytes())


def receive(connection: Connection) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return the next message and its frames.

    Raises:
        EOFError: the other side is gone.
    """
    message = json.loads(connection.recv_bytes())
    shape, frames = message.pop("frames"), None
    if shape is not None:
        frames = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(shape)
    return message, frames


class Scene:
    """The MuJoCo environment of one task after another.

    Args:
        root: folder of assets and bddl_files.
        image_size: pixels.
        wait_steps: motionless actions after every reset.
    """

    def __init__(self, root: str, image_size: int, wait_steps: int):
        import libero.libero as package

        if hasattr(package, "get_assets_path"):
            # hf-libero would download its own assets, whatever its configuration says.
            package._assets_path_cache = os.path.join(root, "assets")
        from libero.libero.envs import OffScreenRenderEnv

        self._make, self._root = OffScreenRenderEnv, root
        self._image_size, self._wait_steps = image_size, wait_steps
        self._task, self._env, self._looked_at = "", None, False

    def start(self, task: str, state: Sequence[float], seed: int) -> tuple[dict, np.ndarray]:
        """Begin an episode of task "<suite>/<name>"; return its pose and camera, and its frame.

        Args:
            state: flattened MuJoCo state.
            seed: of what LIBERO draws at a reset.
        """
        if task != self._task:
            self.close()
            self._env = self._make(
                bddl_file_name=os.path.join(self._root, "bddl_files", f"{task}.bddl"),
                camera_names=[CAMERA],
                camera_heights=self._image_size,
                camera_widths=self._image_size,
                ignore_done=True,  # the number of actions is counted elsewhere
            )
            self._task = task
        self._env.seed(seed)
        self._restart_clocks()
        self._env.reset()
        self._render_on_demand()
        self._quaternion = None
        self._looked_at = not self._wait_steps
        seen = self._env.set_init_state(np.asarray(state, np.float64))
        for index in range(self._wait_steps):
            self._looked_at = index == self._wait_steps - 1
            seen = self._env.step(np.array(NO_MOTION))[0]
        return {"pose": self._pose(seen), "camera": self._camera()}, _turned(seen)[None]

    def play(
        self, actions: Sequence[Sequence[float]], film: bool, blind: bool = False
    ) -> tuple[dict, np.ndarray]:
        """Play actions [k 7]; return poses and success after each, and the frames.

        Args:
            film: return the frame after every action [k H W 3], else only the last [1 H W 3].
            blind: return no frame [0 1 1 3]; rendering takes nine tenths of the time.
        """
        poses, success, frames = [], [], []
        for index, action in enumerate(actions):
            self._looked_at = not blind and (film or index == len(actions) - 1)
            seen, _, done, _ = self._env.step(np.array(action))
            poses.append(self._pose(seen))
            success.append(bool(done))
            if self._looked_at:
                frames.append(_turned(seen))
        return {"poses": poses, "success": success}, _stacked(frames)

    def look(self) -> tuple[dict]:
        """Return where everything is: name -> xyz (m) and quaternion xyzw, of bodies and sites."""
        places = {}
        for name, state in self._env.env.object_states_dict.items():
            seen = state.get_geom_state()
            # LIBERO says a body's quaternion as MuJoCo does, w first, and a site's w last.
            turn = seen["quat"] if state.object_state_type == "site" else np.roll(seen["quat"], -1)
            places[name] = [*np.asarray(seen["pos"]).tolist(), *np.asarray(turn).tolist()]
        return ({"places": places},)

    def show(
        self, states: Sequence[Sequence[float]], fixtures: dict[str, Sequence[float]]
    ) -> tuple[dict, np.ndarray]:
        """Return what `play` does of flattened MuJoCo states [k d], in the task that was started.

        Args:
            fixtures: where bodies that no state moves shall stand until the next start: body ->
                xyz, quaternion wxyz.
        """
        model = self._env.sim.model
        for body, place in fixtures.items():
            index = model.body_name2id(body)
            model.body_pos[index], model.body_quat[index] = place[:3], place[3:]
        self._looked_at = True
        poses, success, frames = [], [], []
        for state in states:
            seen = self._env.set_init_state(np.asarray(state, np.float64))
            poses.append(self._pose(seen))
            success.append(bool(self._env.check_success()))
            frames.append(_turned(seen))
        return {"poses": poses, "success": success}, _stacked(frames)

    def close(self) -> None:
        """End the environment, if there is one."""
        if self._env is not None:
            self._env.close()
        self._task, self._env = "", None

    def _restart_clocks(self) -> None:
        for name in self._env.env.observation_names:
            self._env.env.modify_observable(name, "enabled", True)

    def _render_on_demand(self) -> None:
        """Let the camera render only while `_looked_at`: it takes nine tenths of a step's time.

        robosuite can also switch a camera off, but that shifts the moments at which it samples.
        """
        render = self._env.env._observables[IMAGE]._sensor
        blank = np.zeros((self._image_size, self._image_size, 3), np.uint8)

        @functools.wraps(render)  # robosuite reads the kind of a sensor from the function
        def look(cache: dict) -> np.ndarray:
            return render(cache) if self._looked_at else blank

        self._env.env.modify_observable(IMAGE, "sensor", look)

    def _pose(self, seen: dict[str, np.ndarray]) -> list[float]:
        """Return xyz (m), quaternion xyzw, gripper opening 0..1."""
        quaternion = np.array(seen["robot0_eef_quat"], float)
        before = quaternion if self._quaternion is None else self._quaternion
        # q and -q are one rotation; without a choice the pose would jump between them.
        sign = np.sign(before @ quaternion)
        if self._quaternion is None:
            sign = np.sign(quaternion[np.abs(quaternion).argmax()])
        self._quaternion = quaternion * (sign or 1.0)
        opening = np.abs(seen["robot0_gripper_qpos"]).sum() / (2 * FINGER_TRAVEL)
        return [*seen["robot0_eef_pos"].tolist(), *self._quaternion.tolist(), min(opening, 1.0)]

    def _camera(self) -> dict[str, Any]:
        model, data = self._env.sim.model, self._env.sim.data
        index = model.camera_name2id(CAMERA)
        return {
            "fovy": float(model.cam_fovy[index]),
            "position": np.asarray(data.cam_xpos[index]).tolist(),
            "rotation": np.asarray(data.cam_xmat[index]).reshape(-1).tolist(),
        }


def _turned(seen: dict[str, np.ndarray]) -> np.ndarray:
    """Return the frame uint8 [H W 3] turned by 180 degrees, as OpenVLA-OFT was trained on it."""
    return np.ascontiguousarray(seen[IMAGE][::-1, ::-1])


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack(frames) if frames else np.zeros((0, 1, 1, 3), np.uint8)


def serve(connection: Connection) -> None:
    """Answer requests until the other side is gone."""
    settings, _ = receive(connection)
    scene = Scene(**settings)
    with contextlib.suppress(EOFError):
        while True:
            request, _ = receive(connection)
            answer = getattr(scene, request.pop("do"))(**request)
            send(connection, *answer)


def main() -> None:
    """Serve; send every error to the other side with its traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connection", type=int, required=True, help="inherited socket")
    connection = Connection(parser.parse_args().connection)
    os.set_inheritable(connection.fileno(), False)
    try:
        serve(connection)
    except Exception as error:
        failure = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        with contextlib.suppress(OSError):
            send(connection, failure)
        raise


if __name__ == "__main__":
    main()
