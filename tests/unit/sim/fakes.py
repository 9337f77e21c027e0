"""A world model, a classifier and a pose model whose every number can be told in advance."""

from types import SimpleNamespace

import numpy as np
import torch

from evac_jax.evac.model import EvacState
from evac_jax.sim.env import WorldModelEnv
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.initial_states import Starts

CHUNK, PAST, SIZE = 2, 3, (4, 6)


class FakeWorldModel:
    """Paints x of the pose into the red channel, noise into green, the start's red into blue."""

    def __init__(self):
        self.config = SimpleNamespace(
            chunk=CHUNK,
            n_previous=PAST,
            n_view=1,
            image_size=SIZE,
            latent_size=(1, 1),
            autoencoder=SimpleNamespace(latent_channels=4),
        )
        self.imagined = []  # number of environments of each call

    def start(self, frames, capacity_chunks):
        count, places = len(frames), PAST + capacity_chunks * CHUNK
        state = EvacState(
            latents=torch.zeros(count, places, 1, 4, 1, 1),
            c2w=torch.zeros(count, places, 1, 4, 4),
            tokens=torch.zeros(count, 2, 1, 1, 1),
            length=torch.zeros(count, dtype=torch.long),
        )
        return self.restart(state, frames, torch.ones(count, dtype=torch.bool))

    def restart(self, state, frames, mask):
        state.tokens[mask] = frames[mask, 0, 0, 0, 0].reshape(-1, 1, 1, 1, 1)
        state.length[mask] = 0
        return state

    def imagine(self, state, poses, camera, *, steps, eta, solver, noise, generator, rows, decoded):
        assert len(rows) == len(poses) == len(noise)
        self.imagined.append(len(rows))
        frames = torch.zeros(len(rows), 1, CHUNK, 3, *SIZE)
        frames[:, 0, :, 0] = poses[:, PAST:, 0, None, None]
        frames[:, 0, :, 1] = (noise + eta * generator(0)).mean((1, 2, 4, 5))[..., None, None]
        frames[:, 0, :, 2] = state.tokens[rows, 0, 0, 0, 0].reshape(-1, 1, 1, 1)
        state.length[rows] = state.length[rows].clamp(min=PAST) + CHUNK
        self.undecoded = frames[:, :, : CHUNK - decoded]
        return state, frames[:, :, CHUNK - decoded :]

    def decode_history(self, state, rows, begin, end):
        return self.undecoded[: len(rows), :, : begin - end]


class FakeReward:
    """Success probability = red channel."""

    notes = ()

    def probability(self, frames, instruction=None):
        return frames[:, 0, 0, 0].clamp(0, 1)


class FakePose:
    """x advances by the action's x. The raw network advances twice as far."""

    def get_ee_pose(self, action, pose, before):
        return pose + torch.nn.functional.pad(action[:, :1], (0, 7))

    def __call__(self, action, pose, before):
        return pose + torch.nn.functional.pad(2 * action[:, :1], (0, 7))

    def check_poses(self, poses):
        assert poses.shape[1:] == (8,)


class FakeStarts:
    """Start i is an image of grey level 10 i at x = 0, with task i modulo 2."""

    num_starts, instructions, camera_size = 20, ("even", "odd"), None
    camera = (np.eye(3, dtype=np.float32)[None], np.eye(4, dtype=np.float32)[None])

    def load(self, ids):
        images = np.empty((len(ids), 1, *SIZE, 3), np.uint8)
        images[:] = (10 * ids).reshape(-1, 1, 1, 1, 1)
        return Starts(images, np.zeros((len(ids), 8), np.float32), (ids % 2).astype(np.int32))


class Driver:
    """An environment with its slots; actions are given as x per environment and action."""

    def __init__(self, **settings):
        settings = {"num_envs": 3, "max_episode_steps": 8, "gripper": "none", **settings}
        self.model = FakeWorldModel()
        config = WorldModelEnvConfig(**settings)
        self.env = WorldModelEnv(self.model, FakeReward(), FakePose(), FakeStarts(), config)
        self.frames = torch.full((config.num_envs, 1, *SIZE, 3), 77, dtype=torch.uint8)
        self.clip = torch.zeros(config.clip_envs, CHUNK, 1, *SIZE, 3, dtype=torch.uint8)

    def reset(self, *starts, seed=0):
        return self.env.reset(np.array(starts), seed, self.frames, self.clip)

    def step(self, *x):
        """Each environment's moves: one number for all actions of the chunk, or one per action."""
        actions = np.zeros((len(self.frames), CHUNK, 7), np.float32)
        for row, value in enumerate(x):
            actions[row, :, 0] = value
        return self.env.step(actions, self.frames, self.clip)

    @property
    def pixels(self):
        """Red, green, blue of the first pixel of every environment."""
        return self.frames[:, 0, 0, 0].numpy().copy()
