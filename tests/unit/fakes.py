"""A ground truth whose outcome can be told in advance."""

from types import SimpleNamespace

import numpy as np

from evac_jax.bridge.types import IDLE


class FakeGroundTruth:
    """Succeeds where the first entries of all actions so far sum up to more than the start id.

    Stands in for `evac_jax.simulators.Simulators`; its `started` lists the start ids of every
    reset, its `open` counts slots that nobody has given back.
    """

    def __init__(self, num_envs: int = 3, chunk: int = 2, dim: int = 7):
        self.num_envs, self.started, self.open = num_envs, [], 0
        self.spec = SimpleNamespace(action=SimpleNamespace(chunk=chunk, dim=dim))

    def reset(self, starts, seed):
        assert starts.shape == (self.num_envs,)
        self.started.append(starts.tolist())
        self._starts, self._sum = starts, np.zeros(self.num_envs)
        self._success = np.zeros(self.num_envs)
        return self._step()

    def step(self, actions):
        assert actions.shape == (self.num_envs, self.spec.action.chunk, self.spec.action.dim)
        self._sum = self._sum + actions[:, :, 0].sum(1)
        reached = (self._sum > self._starts) & (self._starts != IDLE)
        self._success = np.maximum(self._success, reached)
        return self._step()

    def _step(self):
        self.open += 1

        def release(*computed):
            self.open -= 1

        result = SimpleNamespace(episode={"success_once": self._success.copy()})
        return SimpleNamespace(result=result, release=release)
