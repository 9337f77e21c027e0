import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algos import advantages as adv
from tests.parity import rl_reference

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=20, deadline=None, derandomize=True)


def loop_gae(rewards, values, dones, gamma, lam, bootstrap):
    out = np.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        following = 0.0
        for t in reversed(range(rewards.shape[1])):
            keep = 0.0 if dones[b, t] and not bootstrap[b, t] else 1.0
            delta = rewards[b, t] + gamma * values[b, t + 1] * keep - values[b, t]
            following = delta + gamma * lam * (0.0 if dones[b, t] else following)
            out[b, t] = following
    return out


@given(seeds)
@few
def test_gae_equals_a_loop_when_episodes_end_anywhere(seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 8))
    dones, bootstrap = rng.random((3, 7)) < 0.3, rng.random((3, 7)) < 0.5
    gamma, lam = rng.random(2)
    ours, returns = jax.jit(adv.gae)(
        jnp.float32(rewards),
        jnp.float32(values),
        dones,
        gamma=gamma,
        gae_lambda=lam,
        bootstrap=bootstrap,
    )
    expected = loop_gae(rewards, values, dones, gamma, lam, bootstrap)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values[:, :-1], rtol=1e-4, atol=1e-5)


@given(seeds)
@few
def test_group_relative_does_not_change_when_a_group_is_shifted(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 4))
    shifted = scores + rng.normal(size=(3, 1))
    np.testing.assert_allclose(
        adv.group_relative(jnp.float32(scores.ravel()), 4),
        adv.group_relative(jnp.float32(shifted.ravel()), 4),
        rtol=1e-3,
        atol=1e-4,
    )


def test_group_relative_is_exactly_zero_when_scores_are_equal():
    scores = jnp.full(6, 0.1)  # not a float32: a naive mean differs from it by rounding
    assert (adv.group_relative(scores, 3) == 0.0).all()


def test_group_relative_is_zero_when_the_group_is_one():
    assert adv.group_relative(jnp.array([1.0, 2.0]), 1).tolist() == [0.0, 0.0]


def test_group_relative_is_plus_minus_root_half_when_two_differ():
    np.testing.assert_allclose(
        adv.group_relative(jnp.array([0.0, 1.0]), 2), [-(0.5**0.5), 0.5**0.5], rtol=1e-5
    )


def test_done_step_counts_and_later_ones_do_not_when_masked():
    dones = jnp.array([[False, True, False, True], [False, False, False, False]])
    valid = adv.valid_until_done(dones)
    assert valid.tolist() == [[True, True, False, False], [True] * 4]
    assert adv.num_valid_actions(valid).tolist() == [2, 4]
    assert not adv.valid_until_done(dones, jnp.array([True, False]))[0].any()


def test_score_stops_at_the_first_done_when_rewards_go_on():
    rewards = jnp.array([[1.0, 2.0, 4.0]])
    assert adv.episode_scores(rewards, jnp.array([[False, True, False]])).tolist() == [3.0]


@pytest.mark.parametrize("normalize", [adv.normalize, rl_reference.normalize_masked])
def test_statistics_come_from_valid_entries_when_masked(normalize):
    x = jnp.array([1.0, 3.0, jnp.nan])
    out = normalize(x, jnp.array([True, True, False]))
    assert float(out[0]) == pytest.approx(-float(out[1]), rel=1e-5)


def test_normalize_returns_its_input_when_fewer_than_two_are_valid():
    x = jnp.array([1.0, 3.0])
    assert adv.normalize(x, jnp.array([True, False])).tolist() == [1.0, 3.0]


def test_filter_bounds_are_inclusive_when_the_mean_hits_them():
    means, kept = adv.reward_filter(jnp.array([0.0, 2.0, 4.0, 4.0, 0.0, 0.0]), 2, low=1.0, high=4.0)
    assert means.tolist() == [1.0, 4.0, 0.0]
    assert kept.tolist() == [True, True, False]


def test_flat_values_end_with_the_next_rows_first_when_per_action():
    values = jnp.arange(6.0).reshape(1, 3, 2)
    assert adv.flatten_values(values).tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]
