from types import SimpleNamespace

import numpy as np
import pytest

from evac_jax import rollout
from evac_jax.bridge.types import IDLE
from evac_jax.errors import SimulatorError, TrainingError


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


@pytest.mark.parametrize(
    ("name", "error"),
    [("rewards", SimulatorError), ("log_probs", TrainingError), ("values", TrainingError)],
)
def test_who_made_them_is_blamed_when_numbers_are_not_finite(name, error):
    batch = {"rewards": np.zeros(4), "log_probs": np.zeros(4), "values": np.zeros(4)}
    rollout._check(SimpleNamespace(**batch))
    batch[name] = np.array([0.0, np.nan, np.inf, 1.0])
    with pytest.raises(error, match=f"2 of 4 {name} that .* not finite"):
        rollout._check(SimpleNamespace(**batch))
