import numpy as np
import pytest

from evac_jax import rollout
from evac_jax.bridge.types import IDLE


def test_starts_are_filled_up_with_idle_environments():
    grid = rollout.padded(np.arange(5), num_envs=3)
    np.testing.assert_array_equal(grid, [[0, 1, 2], [3, 4, IDLE]])


def test_environment_metrics_have_both_names_and_weigh_steps():
    figures = {
        "return": np.array([1.0, 0.0]),
        "length": np.array([8.0, 32.0]),
        "success_once": np.array([True, False]),
        "terminated": np.array([True, False]),
    }
    metrics = rollout.env_metrics(figures)
    assert metrics["env/success_rate"] == metrics["env/success_once"] == 0.5
    assert metrics["env/step_reward"] == pytest.approx(1 / 40)
    assert metrics["env/reward"] == pytest.approx(1 / 16)
    assert metrics["env/termination_rate"] == 0.5
    assert metrics["env/episode_len"] == 20
