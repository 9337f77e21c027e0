"""Writes demonstrations of scripted players into files as LIBERO's and OpenVLA's scripts do."""

import dataclasses

import h5py
import numpy as np

from evac_jax.sim.libero_players import LiberoPlayer, pick_and_place
from tests.unit.sim.libero_toy import PROBLEM, Toy

SIZE = 16
LENGTH = 10  # of a state: time, seven joints, two more
MODEL = """<mujoco><worldbody>
  <body name="robot0_base" pos="0 0 1"/>
  <body name="cabinet_1_main" pos="0.1 0.2 0.3">
    <body name="drawer"><joint type="slide"/></body>
  </body>
  <body name="bowl_1_main" pos="1 2 3"><freejoint name="bowl_1_joint0"/></body>
  <body name="plate_1_main" pos="1 2 3"><joint type="free"/></body>
</worldbody></mujoco>"""


@dataclasses.dataclass
class Truth:
    """What happened: T actions [T 7], T + 1 poses [T+1 8] and success [T+1]."""

    actions: np.ndarray
    poses: np.ndarray
    success: np.ndarray

    @property
    def pictures(self):
        """As policies see them, uint8 [T+1 H W 3]; red tells the frame, green where the top is."""
        pictures = np.full((len(self.poses), SIZE, SIZE, 3), 100, np.uint8)
        pictures[..., 0] = np.arange(len(self.poses))[:, None, None]
        pictures[:, 0, 0, 1] = 200
        return pictures

    @property
    def states(self):
        states = np.zeros((len(self.poses), LENGTH))
        states[:, 0] = 0.05 * np.arange(len(self.poses))
        states[:, 1:4] = self.poses[:, :3]
        return states


def play(seed, pauses=()):
    """Play the toy with the noisy player; at times of `pauses` it does nothing."""
    world, rng = Toy(), np.random.default_rng(seed)
    player = LiberoPlayer("noisy", pick_and_place("t", PROBLEM), rng)
    actions, poses, success = [], [world.pose.copy()], [False]
    while not success[-1] and len(actions) < 200:
        action = player.act(world.pose, world.places)
        if len(actions) in pauses:
            action = np.append(np.zeros(6), actions[-1][6] if actions else -1).astype(np.float32)
        world.step(action)
        actions.append(action)
        poses.append(world.pose.copy())
        success.append(world.success)
    return Truth(np.array(actions), np.array(poses), np.array(success))


def write(path, truths, *, after, convention="opengl"):
    """Write data/demo_<n>; `after`: as LIBERO's own files, else as OpenVLA's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if after:
            data.attrs["macros_image_convention"] = convention
        for n, truth in enumerate(truths):
            count = len(truth.actions)
            rows = np.arange(count) + after
            group = data.create_group(f"demo_{n}")
            if after:
                group.attrs["model_file"] = MODEL
            group["actions"] = truth.actions.astype(float)
            group["states"] = truth.states[:-1]
            group["rewards"] = np.eye(count, dtype=np.uint8)[-1]
            group["dones"] = group["rewards"][()]
            stored = truth.pictures[rows][:, :, ::-1]
            group["obs/agentview_rgb"] = stored if convention == "opencv" else stored[:, ::-1]
            group["obs/eye_in_hand_rgb"] = stored
            group["obs/ee_pos"] = truth.poses[rows, :3]
            group["obs/ee_ori"] = np.tile([np.pi, 0.0, 0.0], (count, 1))
            fingers = 0.04 * truth.poses[rows, 7:]
            group["obs/gripper_states"] = np.concatenate((fingers, -fingers), axis=1)
            group["obs/joint_states"] = truth.states[rows, 1:8]
