from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import losses
from tests.parity.rl_reference import action_log_probs, interpolate_log_probs

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def test_gradient_is_full_when_the_ratio_is_one():
    x = jnp.array([-1.0, -2.0])
    gradient = jax.grad(lambda y: losses.clipped_surrogate(y, x, jnp.ones(2), **CLIP).loss.sum())(x)
    assert gradient.tolist() == [-1.0, -1.0]


def test_gradient_is_full_when_the_clip_range_is_empty_and_the_ratio_one():
    x = jnp.zeros(1)
    gradient = jax.grad(
        lambda y: losses.clipped_surrogate(
            y, x, jnp.ones(1), clip_low=0.0, clip_high=0.0
        ).loss.sum()
    )(x)
    assert gradient.tolist() == [-1.0]


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan, 500.0])
def test_gradient_is_finite_when_masked_entries_are_not(bad):
    new, old = jnp.array([-1.0, bad]), jnp.array([-1.5, -1.0])
    valid = jnp.array([True, False])

    def loss(y):
        surrogate = losses.clipped_surrogate(y, old, jnp.array([1.0, jnp.nan]), valid, **CLIP)
        return losses.weighted_sum(surrogate.loss, losses.mean_weights(valid, (2,)))

    value, gradient = jax.value_and_grad(loss)(new)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
    assert gradient[1] == 0.0


def test_dual_clip_bounds_the_loss_when_the_advantage_is_negative():
    new, old = jnp.log(jnp.array([5.0, 5.0])), jnp.zeros(2)
    surrogate = losses.clipped_surrogate(new, old, jnp.array([-2.0, 2.0]), clip_ratio_c=3.0, **CLIP)
    np.testing.assert_allclose(surrogate.loss, [6.0, -2.0 * 1.28], rtol=1e-6)
    assert surrogate.dual_clipped.tolist() == [True, False]


def test_log_ratio_clip_stops_the_gradient_when_outside():
    gradient = jax.grad(
        lambda y: losses.clipped_surrogate(
            y, jnp.zeros(2), -jnp.ones(2), log_ratio_bounds=(-1.0, 1.0), **CLIP
        ).loss.sum()
    )(jnp.array([2.0, 0.5]))
    assert gradient[0] == 0.0
    assert gradient[1] > 0.0


def test_masked_mean_counts_tokens_when_the_mask_is_per_action():
    valid = jnp.array([[[True], [False]]])
    ones = jnp.ones((1, 2, 3))
    mean = losses.weighted_sum(ones, losses.mean_weights(valid, ones.shape))
    reference = losses.weighted_sum(ones, losses.mean_weights(valid, ones.shape, reference=True))
    assert (float(mean), float(reference)) == (1.0, 3.0)


@pytest.mark.parametrize("kind", get_args(losses.Aggregation))
def test_aggregation_is_zero_when_nothing_is_valid(kind):
    valid = jnp.zeros((2, 3), bool)
    weights = losses.aggregation_weights(kind, valid, (2, 3))
    assert losses.weighted_sum(jnp.full((2, 3), jnp.inf), weights) == 0.0


def test_empty_rows_are_left_out_unless_reference():
    valid = jnp.array([[False, False], [True, False]])
    x = jnp.array([[5.0, 5.0], [2.0, 5.0]])
    ours = losses.sequence_weights(valid, (2, 2), mean=True)
    reference = losses.sequence_weights(valid, (2, 2), mean=True, reference=True)
    assert losses.weighted_sum(x, ours) == 2.0
    assert jnp.isnan(losses.weighted_sum(x, reference))


def test_episodes_weigh_the_same_when_their_lengths_differ():
    valid = jnp.array([[True, False, False, False], [True, True, True, True]])
    share = valid.sum(axis=1, keepdims=True) / 4.0
    weights = losses.length_weights(valid, jnp.broadcast_to(share, (2, 4)), (2, 4))
    assert weights.sum(axis=1).tolist() == [0.5, 0.5]


def test_versions_one_behind_are_proximal_themselves():
    new, old = jnp.array([-1.0, -1.0, -1.0]), jnp.array([-3.0, -3.0, -3.0])
    versions = jnp.array([3.0, 2.0, -1.0])
    proximal = interpolate_log_probs(new, old, versions, 4.0)
    np.testing.assert_allclose(proximal, [-3.0, -2.0, -3.0])


def test_decoupled_equals_plain_when_the_proximal_policy_is_the_old_one():
    new, old = jnp.array([-1.0, -2.0]), jnp.array([-1.1, -1.5])
    advantages = jnp.array([1.0, -1.0])
    surrogate, log_weight, left = losses.decoupled_surrogate(new, old, old, advantages, **CLIP)
    plain = losses.clipped_surrogate(new, old, advantages, **CLIP)
    np.testing.assert_allclose(surrogate.loss, plain.loss)
    assert (log_weight == 0.0).all()
    assert left.all()


def test_value_loss_is_pessimistic_when_the_value_moved_far():
    loss = losses.clipped_value_loss(
        jnp.array([1.0]), jnp.array([1.0]), jnp.array([0.0]), value_clip=0.2, huber_delta=10.0
    )
    np.testing.assert_allclose(loss, [0.5 * 0.8**2], rtol=1e-6)


def test_k3_gradient_is_that_of_the_policy_first():
    gradient = jax.grad(lambda x: losses.kl_penalty(x, jnp.array(-2.0), "k3"))(jnp.array(-1.0))
    assert float(gradient) == pytest.approx(1.0 - np.exp(-1.0), rel=1e-6)
    with pytest.raises(ValueError, match="KL kind"):
        losses.kl_penalty(jnp.zeros(1), jnp.zeros(1), "full")


def test_entropy_gradient_is_finite_and_windowed_when_tokens_are_restricted():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 10))
    tokens = jnp.full((2, 3), 5)

    def entropy(x):
        return action_log_probs(x, tokens, first_token=4, end_token=8, top_k=7)[1].sum()

    gradient = jax.grad(entropy)(logits)
    assert jnp.isfinite(gradient).all()
    assert (gradient[..., :4] == 0).all()
    assert (gradient[..., 8:] == 0).all()


def test_log_probs_are_a_distribution_when_summed_over_the_window():
    logits = jax.random.normal(jax.random.key(1), (9,))
    log_probs = [
        action_log_probs(logits, jnp.array(t), first_token=3, end_token=7, temperature=1.6)[0]
        for t in range(3, 7)
    ]
    assert float(jnp.exp(jnp.stack(log_probs)).sum()) == pytest.approx(1.0, rel=1e-5)


def test_match_rank_refuses_when_action_entries_would_be_dropped():
    with pytest.raises(ValueError, match="chunk level"):
        losses.match_rank(jnp.zeros((2, 4)), 1)
    with pytest.raises(ValueError, match="level must be one of"):
        losses.reduce_to_level(jnp.zeros((1, 2, 3)), "action")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        losses.aggregation_weights("mean", None, (2,))
