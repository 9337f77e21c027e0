"""A small deterministic environment for tests of the bridge; misbehaves when an action says so."""

import os
import signal
import sys
import time

import numpy as np

from evac_jax.bridge.environment import EnvSpec, StepResult
from policies.spec import ActionSpec

# Values of actions[0, 0, 0] that ask for trouble.
RAISE, HANG, DIE, EXIT, BAD_RESULT = 101.0, 102.0, 103.0, 104.0, 105.0


def frame_value(env: int, start: int, seed: int, steps: int) -> int:
    """Return the grey level of every pixel of an environment after `steps` chunks."""
    return (17 * env + 31 * start + 7 * seed + 5 * steps + 1) % 256


class FakeEnv:
    """Frames of one grey level each, that follow from start, seed and number of chunks.

    `config`: num_envs, size (H, W), chunk, clip_envs, views, log (a line printed at the start),
    fail (raise in the constructor), sleep_s (per step).
    """

    def __init__(self, config: dict):
        if message := config.get("fail"):
            raise ValueError(message)
        sys.stderr.write(config.get("log", "fake environment ready") + "\n")
        sys.stderr.flush()
        self._config = config
        height, width = config.get("size", (64, 64))
        self.spec = EnvSpec(
            num_envs=config.get("num_envs", 4),
            image_shape=(config.get("views", 1), height, width, 3),
            proprio_dim=7,
            action=ActionSpec(dim=7, chunk=config.get("chunk", 2)),
            instructions=("push", "pull"),
            num_starts=10,
            max_episode_steps=8,
            clip_envs=config.get("clip_envs", 1),
            num_keyframes=2,
        )

    def reset(self, starts, seed, frames, clip):
        self._starts, self._seed, self._steps = starts, seed, 0
        return self._answer(frames, clip)

    def step(self, actions, frames, clip):
        order = float(actions[0, 0, 0])
        if order == RAISE:
            raise ValueError("the drawer is jammed")
        if order == HANG:
            frames.fill_(255)
            time.sleep(600)
        if order == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if order == EXIT:
            sys.stdout.write("leaving without a word\n")
            sys.stdout.flush()
            os._exit(3)
        time.sleep(self._config.get("sleep_s", 0))
        self._steps += 1
        result = self._answer(frames, clip)
        result.rewards[:, 0] = actions[:, 0, 0]
        if order == BAD_RESULT:
            result.rewards[1, 0] = np.nan
        return result

    def _answer(self, frames, clip):
        B, K = self.spec.num_envs, self.spec.action.chunk
        values = [
            frame_value(env, int(start), self._seed, self._steps)
            for env, start in enumerate(self._starts)
        ]
        for row in range(B):  # one by one, so that a torn frame would be seen
            frames[row].fill_(values[row])
        for row in range(len(clip)):
            clip[row].fill_(values[row])
        return StepResult(
            task=(self._starts % 2).astype(np.int32),
            proprio=np.full((B, 7), self._steps, np.float32),
            rewards=np.zeros((B, K), np.float32),
            terminated=np.zeros(B, bool),
            truncated=np.zeros(B, bool),
            success=np.zeros(B, bool),
            episode={"length": np.full(B, self._steps * K, np.float32)},
            seconds={"imagine": 0.0},
        )

    def parts(self, count):
        return [FakeEnv(self._config) for _ in range(count)]

    def park(self):
        pass

    def close(self):
        sys.stderr.write("fake environment closed\n")


def make(config: dict) -> FakeEnv:
    """Factory named by worker specs."""
    return FakeEnv(config)
