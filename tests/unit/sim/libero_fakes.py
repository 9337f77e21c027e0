"""A package tree that LIBERO's processes import instead of LIBERO; all but MuJoCo is exercised.

The stand-in moves its arm by 0.1 m x action and opens or closes the gripper at once. Success is a
closed gripper beyond x = 0.25 m. Its picture is LIBERO's way up: bottom row first. There are a bowl
and a plate that nothing moves; a fixture shows in a pixel of its own. It writes down what it is
asked in the file FAKE_LIBERO_LOG, one JSON value per line.
"""

import json
from pathlib import Path

import numpy as np

from evac_jax.config.libero import LiberoConfig
from evac_jax.config.libero_files import TASK_MAP

SIZE = 12
TASKS = ("pick_up_the_bowl", "KITCHEN_SCENE10_close_the_drawer")
BOWL, PLATE = (0.3, 0.2, 0.4), (0.1, 0.5, 0.4)  # where they are, metres
FIXTURE = "cabinet_1_main"
GOALS = ("On akita_black_bowl_1 plate_1", "Close cabinet_1")

_TASK = """
(define (problem LIBERO_Tabletop_Manipulation)
  (:fixtures main_table - table)
  (:objects akita_black_bowl_1 - akita_black_bowl plate_1 - plate)
  (:init (On plate_1 main_table_plate_region))
  (:goal (And ({goal})))
) """
_ASSETS = {
    "scenes/libero_tabletop_base_style.xml": '<texture file="../textures/wood.png"/>',
    "textures/wood.png": "",
    "objects/bowl/akita_black_bowl.xml": """
        <!-- <mesh file="old.obj"/> --> <mesh file="visual/bowl.msh"/>
    """,
    "objects/bowl/visual/bowl.msh": "",
    "objects/plate/plate.xml": "",
}

_MUJOCO = """
from types import SimpleNamespace

mjtRndFlag = SimpleNamespace(mjRND_REFLECTION=SimpleNamespace(value=1))


class MjModel:
    def from_xml_string(text):
        assert text == "<mujoco/>"


def mj_step1(model, data):
    data.append("first half")


def mj_step2(model, data):
    data.append("second half")
"""

_PACKAGE = """
import json, os
path = os.path.join(os.environ["LIBERO_CONFIG_PATH"], "config.yaml")
if not os.path.exists(path):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
assert os.path.isdir(json.load(open(path))["assets"])
assert os.environ["MUJOCO_GL"] == "osmesa"
"""

_ENVS = """
import json, os, signal
from types import SimpleNamespace
import numpy as np


class Robot:
    def __init__(self):
        self.gripper = SimpleNamespace(current_action=np.ones(2))
        self.asked = []

    @property
    def action_limits(self):
        self.asked.append("action")
        return 1.0

    @property
    def torque_limits(self):
        self.asked.append("torque")
        return 2.0


class OffScreenRenderEnv:
    def __init__(
        self, bddl_file_name, camera_names, camera_heights, camera_widths, ignore_done, hard_reset
    ):
        assert ignore_done and not hard_reset
        self._kind = open(bddl_file_name).read().split()[-1]  # as LIBERO: no file, no task
        self._size = camera_heights
        self.env = self
        robot = [f"robot0_{name}" for name in ("eef_pos", "eef_quat", "gripper_qpos")]
        self._observables = dict.fromkeys([*robot, "bowl_pos"])
        self._observables["agentview_image"] = SimpleNamespace(_sensor=self._picture)
        self.object_property_initializers = ["drawer"]
        self.robots = [Robot()]
        turn = [0, 0, 1, 1, 0, 0, 0, 1, 0]  # looks along -x of the world
        self.sim = SimpleNamespace(
            _render_context_offscreen=SimpleNamespace(scn=SimpleNamespace(flags=[1, 1])),
            model=SimpleNamespace(
                _model="model",
                cam_fovy=[0.0, 90.0],
                camera_name2id=lambda name: 1,
                body_name2id=["world", "cabinet_1_main"].index,
                body_pos=np.zeros((2, 3)),
                body_quat=np.zeros((2, 4)),
            ),
            data=SimpleNamespace(
                _data=[],
                cam_xpos=np.array([[9.0, 9, 9], [1, 0, 0]]), cam_xmat=np.array([[0.0] * 9, turn])
            ),
        )
        self.object_states_dict = {
            "akita_black_bowl_1": _thing("object", [0.3, 0.2, 0.4], [0.6, 0.0, 0.0, 0.8]),
            "plate_1": _thing("object", [0.1, 0.5, 0.4], [1.0, 0.0, 0.0, 0.0]),
            "cabinet_1_top_region": _thing("site", [0.0, 0.0, 0.9], [0.0, 0.0, 0.8, 0.6]),
        }
        _log("made", os.path.basename(bddl_file_name))

    @property
    def observation_names(self):
        assert "bowl_pos" not in self._observables  # nobody reads it
        return set(self._observables)

    def seed(self, seed):
        self._clocks = set()
        _log("seed", seed)

    def reset(self):
        assert self._clocks == self.observation_names
        assert self.object_property_initializers == ["drawer"] * 2
        assert not self.robots[0].gripper.current_action.any()
        assert not self.sim.model.body_pos.any()
        assert not {"forward", "step"} & set(vars(self.sim))  # only within a step
        self.sim.model.body_pos[1] = 0.5
        self._position, self._closed, self._clocks = np.zeros(3), False, set()

    def set_init_state(self, state):
        assert self._kind != "broken", "the scene is broken"
        self._position, self._turns = state[1:4].copy(), 1
        self._closed = bool(state[4] < 0)
        return self._seen()

    def check_success(self):
        return self._closed and self._position[0] > 0.25

    def modify_observable(self, name, attribute, value):
        if attribute == "enabled":
            self._clocks.add(name)
        else:
            assert (name, attribute) == ("agentview_image", "sensor")
            self._observables[name]._sensor = value
            assert value({}).shape == (self._size, self._size, 3)  # robosuite tries it

    def step(self, action):
        assert action.shape == (7,) and np.abs(action).max() <= 1
        if self._kind == "deadly" and action[6] > 0:
            print("about to die")
            os.kill(os.getpid(), signal.SIGKILL)
        self.sim.forward()
        self._pre_action(action)
        self.sim.step()
        assert self.sim.data._data == ["first half", "second half"]
        self.sim.data._data.clear()
        self._closed = bool(action[6] > 0)
        self._turns = -self._turns  # the same rotation, named by the opposite quaternion
        success = self.check_success()
        seen = self._seen()
        _log("step", action.tolist(), bool(seen["agentview_image"].any()))
        return seen, float(success), success, {}

    def _pre_action(self, action, policy_step=False):
        self.sim.forward()  # asks for nothing new
        self._position = self._position + 0.1 * action[:3]
        robot = self.robots[0]
        assert (robot.action_limits, robot.torque_limits) == (1.0, 2.0)
        assert robot.asked == ["action", "torque"]  # once
        self.robots[0].gripper.current_action += action[6]

    def _seen(self):
        fingers = 0.0 if self._closed else 0.04
        return {
            "agentview_image": self._observables["agentview_image"]._sensor({}),
            "robot0_eef_pos": self._position.copy(),
            "robot0_eef_quat": self._turns * np.array([0.8, 0.6, 0.0, 0.0]),
            "robot0_gripper_qpos": np.array([fingers, -fingers]),
        }

    def _picture(self, cache):
        image = np.zeros((self._size, self._size, 3), np.uint8)
        image[0, 0] = 255, 0, 0
        image[1, 2] = np.rint(100 * np.abs(self._position)).astype(np.uint8)
        image[2, 2] = np.rint(100 * self.sim.model.body_pos[1]).astype(np.uint8)
        return image

    def close(self):
        _log("closed")


def _thing(kind, pos, quat):
    return SimpleNamespace(
        object_state_type=kind,
        get_geom_state=lambda: {"pos": np.array(pos), "quat": np.array(quat)},
    )


def _log(*values):
    with open(os.environ["FAKE_LIBERO_LOG"], "a") as file:
        file.write(json.dumps([os.getpid(), *values]) + "\\n")
"""


def write(folder: Path, suite: str = "libero_spatial", kind: str = "") -> LiberoConfig:
    """Write packages, assets and two tasks x two initial states; return how they are run.

    Args:
        kind: "broken": the second task fails at its start; "deadly": its process dies when the
            gripper closes.
    """
    for package in ("libero", "libero/libero", "robosuite", "mujoco", "bddl"):
        (folder / "packages" / package).mkdir(parents=True)
        (folder / "packages" / package / "__init__.py").write_text("")
    (folder / "packages/mujoco/__init__.py").write_text(_MUJOCO)
    root = folder / "packages/libero/libero"
    (root / "__init__.py").write_text(_PACKAGE)
    (root / "envs.py").write_text(_ENVS)
    (root / "benchmark").mkdir()
    (root / TASK_MAP).write_text(f"libero_task_map = {{{suite!r}: {list(TASKS)!r}}}\n")
    for name, text in _ASSETS.items():
        (root / "assets" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "assets" / name).write_text(text)
    (root / "bddl_files" / suite).mkdir(parents=True)
    (root / "init_files" / suite).mkdir(parents=True)
    for task, goal, does in zip(TASKS, GOALS, ("fine", kind or "fine"), strict=True):
        text = _TASK.format(goal=goal) + does
        (root / "bddl_files" / suite / f"{task}.bddl").write_text(text)
    config = LiberoConfig(
        suite=suite, root=str(root), renderer="osmesa", image_size=SIZE, max_steps=12
    )
    write_states(config, [np.array([[0, x, y, 0.5, 7] for x in (0.0, 0.2)]) for y in (0.3, 0.6)])
    return config


def write_states(config: LiberoConfig, states: list[np.ndarray]) -> None:
    """Write the initial states [n d] of the two tasks, instead of those that `write` wrote."""
    for task, mine in zip(TASKS, states, strict=True):
        np.savez(config.files.states_file(config.suite, task), states=mine)


def environment(folder: Path) -> dict[str, str]:
    """What processes of the stand-in need in their environment."""
    return {"PYTHONPATH": str(folder / "packages"), "FAKE_LIBERO_LOG": str(folder / "log")}


def asked(folder: Path, what: str) -> list[list]:
    """Return what the stand-in was asked of one kind: [process id, ...] in the order of asking."""
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [[pid, *values] for pid, name, *values in lines if name == what]
