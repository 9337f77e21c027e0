import jax.numpy as jnp
import pytest

from tests.parity import rewards


def test_relative_rewards_sum_to_the_last_level_when_carried_over_chunks():
    levels = jnp.array([[0.2, 0.7, 0.5, 1.0]])
    whole = rewards.relative(levels)
    parts = [rewards.relative(levels[:, :2]), rewards.relative(levels[:, 2:], levels[:, 1])]
    assert jnp.allclose(whole, jnp.concatenate(parts, axis=1))
    assert float(whole.sum()) == pytest.approx(1.0)


def test_coefficient_is_forgotten_only_when_reference():
    scores = jnp.array([[[0.5, 1.0]]])
    options = {"coefficient": 5.0, "use_relative": False, "success_threshold": 0.9}
    ours, success = rewards.world_model_reward(scores, **options)
    reference, _ = rewards.world_model_reward(scores, reference=True, **options)
    assert ours.tolist() == [[[2.5, 5.0]]]
    assert reference.tolist() == scores.tolist()
    assert success.tolist() == [[True]]


def test_penalty_is_paid_once_when_rewards_are_relative():
    terminations = jnp.array([[False, True, True]])
    options = {"coefficient": 5.0, "step_penalty": True}
    relative = rewards.simulator_reward(terminations, use_relative=True, **options)
    absolute = rewards.simulator_reward(terminations, use_relative=False, **options)
    assert relative.tolist() == [[-1.0, 5.0, 0.0]]
    assert absolute.tolist() == [[-1.0, 4.0, 4.0]]


@pytest.mark.parametrize(("always", "expected"), [(False, [0.0, 2.0]), (True, [2.0, 2.0])])
def test_value_is_added_when_the_chunk_ended_the_episode(always, expected):
    out = rewards.bootstrap_rewards(
        jnp.zeros((2, 2)),
        jnp.array([[False, True], [False, False]]),
        jnp.array([[False, False], [False, True]]),
        jnp.full((2, 1), 4.0),
        gamma=0.5,
        always=always,
    )
    assert out[:, -1].tolist() == expected
