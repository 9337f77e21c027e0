"""One LIBERO environment in a process of its own: `python -m evac_jax.sim.libero_worker`.

Started by `evac_jax.sim.libero_pool`, never by hand, in the interpreter that has LIBERO. This file
imports NumPy and LIBERO, no torch and nothing else of evac_jax. Requests and answers are JSON on an
inherited socket, frames follow as raw bytes.

Source: behaviour of moojink/openvla-oft's LIBERO evaluation (213c5ff): rotation of the frames,
motionless actions at the start. Differences: 1. LIBERO's random numbers, which place the
fixtures, are seeded before every reset, there once per task; 2. a reset keeps the scene and puts
back by hand all that a reset which builds it anew would, so that every episode is the one that a
new environment of upstream would play first; 3. only frames that are used are rendered, and
nothing is computed twice. tests/integration/test_libero_simulator.py compares the numbers.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

CAMERA = "agentview"
IMAGE = f"{CAMERA}_image"
WHOLE = (0.0, 1.0, 0.0, 1.0)  # crop that shows all of the picture
# What is read of robosuite's observations; it looks at each of all 30 in every substep.
OBSERVED = (IMAGE, "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
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
        assets: folder of LIBERO's meshes and textures.
        image_size, crop, oversample, reflections: of the frames, see `LiberoConfig`.
        action_repeat: how often each action is played.
        wait_steps: motionless actions after every reset.
    """

    def __init__(
        self,
        assets: str,
        image_size: int,
        crop: Sequence[float],
        oversample: int,
        reflections: bool,
        action_repeat: int,
        wait_steps: int,
    ):
        import libero.libero as package

        if hasattr(package, "get_assets_path"):
            # hf-libero would download its own assets, whatever its configuration says.
            package._assets_path_cache = assets
        from libero.libero.envs import OffScreenRenderEnv

        self._make = OffScreenRenderEnv
        self._image_size, self._crop, self._oversample = image_size, crop, oversample
        self._reflections = reflections
        self._repeat, self._wait_steps = action_repeat, wait_steps
        self._task, self._env, self._bodies = "", None, []
        self._looked_at = False

    def start(self, task: str, state: Sequence[float], seed: int) -> tuple[dict, np.ndarray]:
        """Begin an episode of the task of a bddl file; return its pose and camera, and its frame.

        Args:
            state: flattened MuJoCo state.
            seed: of what LIBERO draws at a reset.
        """
        self._looked_at = False
        if task != self._task:
            self.close()
            self._build(task)
        self._env.seed(seed)
        self._restart()
        self._env.reset()
        self._quaternion = None
        self._looked_at = not self._wait_steps
        seen = self._env.set_init_state(np.asarray(state, np.float64))
        for index in range(self._wait_steps):
            self._looked_at = index == self._wait_steps - 1
            seen = self._env.step(np.array(NO_MOTION))[0]
        return {"pose": self._pose(seen), "camera": self._camera()}, _turned(seen)[None]

    def _build(self, task: str) -> None:
        """Build the scene of a task; it stays until another task is asked for."""
        self._env = self._make(
            bddl_file_name=task,
            camera_names=[CAMERA],
            camera_heights=self._image_size,
            camera_widths=self._image_size,
            ignore_done=True,  # the number of actions is counted elsewhere
            hard_reset=False,  # `_restart` makes up for it
        )
        self._task, inner = task, self._env.env
        # A hard reset adds the samplers of doors and drawers a second time; all that is drawn after
        # them depends on it. Upstream's first episode is the one after the first hard reset.
        inner.object_property_initializers *= 2
        model = inner.sim.model
        self._bodies = [(part, part.copy()) for part in (model.body_pos, model.body_quat)]
        inner._observables = {name: inner._observables[name] for name in OBSERVED}
        for robot in inner.robots:
            _ask_limits_once(robot)
        _release_memory()
        self._compute_once()
        self._render_on_demand()

    def play(
        self,
        actions: Sequence[Sequence[float]],
        film: bool,
        blind: bool = False,
        follow: Sequence[str] = (),
    ) -> tuple[dict, np.ndarray]:
        """Play actions [k 7]; return poses, success and objects after each, and the frames.

        Args:
            film: return the frame after every action [k H W 3], else only the last [1 H W 3].
            blind: return no frame [0 1 1 3]; rendering takes nine tenths of the time.
            follow: names of the objects whose xyz (m) is returned.
        """
        poses, success, objects, frames = [], [], [], []
        for index, action in enumerate(actions):
            wanted = not blind and (film or index == len(actions) - 1)
            reached = False
            for repeat in range(self._repeat):
                self._looked_at = wanted and repeat == self._repeat - 1
                seen, _, done, _ = self._env.step(np.array(action))
                reached |= bool(done)
            poses.append(self._pose(seen))
            success.append(reached)
            objects.append([place[:3] for place in self._places(follow).values()])
            if wanted:
                frames.append(_turned(seen))
        return {"poses": poses, "success": success, "objects": objects}, _stacked(frames)

    def look(self) -> tuple[dict]:
        """Return where everything is: name -> xyz (m) and quaternion xyzw, of bodies and sites."""
        return ({"places": self._places(self._env.env.object_states_dict)},)

    def _places(self, names: Iterable[str]) -> dict[str, list[float]]:
        places = {}
        for name in names:
            state = self._env.env.object_states_dict[name]
            seen = state.get_geom_state()
            # LIBERO says a body's quaternion as MuJoCo does, w first, and a site's w last.
            turn = seen["quat"] if state.object_state_type == "site" else np.roll(seen["quat"], -1)
            places[name] = [*np.asarray(seen["pos"]).tolist(), *np.asarray(turn).tolist()]
        return places

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
        nothing = [[]] * len(poses)
        return {"poses": poses, "success": success, "objects": nothing}, _stacked(frames)

    def close(self) -> None:
        """End the environment, if there is one."""
        if self._env is not None:
            self._env.close()
        self._task, self._env, self._bodies = "", None, []

    def _restart(self) -> None:
        """Put back what a reset leaves as it was, unless the whole scene is built anew."""
        for name in self._env.env.observation_names:
            self._env.env.modify_observable(name, "enabled", True)  # their clocks
        for robot in self._env.env.robots:
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        for part, first in self._bodies:  # where fixtures stand; the reset moves most of them
            part[:] = first

    def _compute_once(self) -> None:
        """Compute positions, velocities and forces once in every substep, not two or three times.

        robosuite computes all of a state, asks its controllers for torques, and lets MuJoCo step;
        the controllers and the step compute the same again. Controllers need positions and
        velocities only, so MuJoCo's step is done in its two halves, with them in between.
        """
        import mujoco

        inner, sim = self._env.env, self._env.sim
        state = sim.model._model, sim.data._data
        halves = {"forward": mujoco.mj_step1, "step": mujoco.mj_step2}
        halves = {name: functools.partial(half, *state) for name, half in halves.items()}
        play, act = inner.step, inner._pre_action

        def pre_action(action: np.ndarray, policy_step: bool = False) -> None:
            with _replaced(sim, forward=lambda: None):
                act(action, policy_step)

        def step(action: np.ndarray) -> tuple:
            with _replaced(sim, **halves):
                return play(action)

        inner.step, inner._pre_action = step, pre_action

    def _render_on_demand(self) -> None:
        """Let the camera render only while `_looked_at`: it takes nine tenths of a step's time.

        robosuite can also switch a camera off, but that shifts the moments at which it samples.
        """
        import mujoco

        inner, size = self._env.env, self._image_size
        mirrors = mujoco.mjtRndFlag.mjRND_REFLECTION.value
        inner.sim._render_context_offscreen.scn.flags[mirrors] = self._reflections
        render = official = inner._observables[IMAGE]._sensor
        if self._oversample or tuple(self._crop) != WHOLE:
            from evac_jax.sim.libero_picture import Picture

            picture = Picture(inner.sim, CAMERA, size, self._crop, self._oversample)
            render = lambda cache: picture.draw()  # noqa: E731
        blank = np.zeros((size, size, 3), np.uint8)

        @functools.wraps(official)  # robosuite reads the kind of a sensor from the function
        def look(cache: dict) -> np.ndarray:
            return render(cache) if self._looked_at else blank

        inner.modify_observable(IMAGE, "sensor", look)

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


@contextlib.contextmanager
def _replaced(thing: Any, **methods: Callable) -> Iterator[None]:
    """Let an object have other methods for a while."""
    before = {name: vars(thing)[name] for name in methods if name in vars(thing)}
    vars(thing).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(thing)[name]
        vars(thing).update(before)


def _ask_limits_once(robot: Any) -> None:
    """Keep a robot's limits; robosuite asks the model for them in every substep."""
    limits = ("action_limits", "torque_limits")
    kept = {name: functools.cached_property(getattr(type(robot), name).fget) for name in limits}
    robot.__class__ = type(type(robot).__name__, (type(robot),), kept)


def _release_memory() -> None:
    """Give back what MuJoCo and malloc keep of the text and meshes that a scene was built from."""
    import mujoco

    mujoco.MjModel.from_xml_string("<mujoco/>")  # replaces the last one, kept for mj_saveLastXML
    with contextlib.suppress(AttributeError):  # not glibc's malloc
        ctypes.CDLL(None).malloc_trim(0)


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
