import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policies.openvla_oft import action_tokens
from policies.openvla_oft.action_tokens import ActionStatistics
from tests.parity.action_codec import actions_to_tokens, tokens_to_actions


def test_bins_run_from_one_to_minus_one_when_ids_grow():
    centres = action_tokens.bin_centres()
    assert centres[0] == centres[1] == pytest.approx(1 - 1 / 255)
    assert centres[255] == pytest.approx(-1 + 1 / 255)
    assert (np.diff(centres[1:]) < 0).all()


def test_masked_dimension_stays_normalised_when_actions_are_unnormalised():
    statistics = ActionStatistics((0.0, 0.0), (10.0, 10.0), (True, False))
    actions = tokens_to_actions(np.array([255, 255]), statistics, first_token=0)
    np.testing.assert_allclose(actions, [10 * 0.5 / 255, -1 + 1 / 255], rtol=1e-6)


def test_tokens_come_back_when_actions_are_encoded():
    statistics = ActionStatistics((-2.0,), (3.0,), (True,))
    tokens = np.arange(101, 101 + 255)[:, None]
    actions = tokens_to_actions(tokens, statistics, first_token=100)
    encoded = actions_to_tokens(actions, statistics, first_token=100)
    np.testing.assert_array_equal(encoded, tokens)


def test_statistics_are_found_when_the_key_lacks_its_suffix():
    stats = {"a_no_noops": {"action": {"q01": [0.0], "q99": [1.0], "min": [-5.0], "max": [5.0]}}}
    assert ActionStatistics.from_norm_stats(stats, "a") == ActionStatistics((0.0,), (1.0,), (True,))
    assert ActionStatistics.from_norm_stats(stats, "a", "min_max").low == (-5.0,)
    with pytest.raises(KeyError, match="a_no_noops"):
        ActionStatistics.from_norm_stats(stats, "b")


def test_ties_stay_when_top_k_cuts():
    kept = action_tokens.keep_top_k(jnp.array([1.0, 3.0, 2.0, 2.0]), 2)
    np.testing.assert_array_equal(kept, [-np.inf, 3.0, 2.0, 2.0])


def test_entropy_and_gradient_are_finite_when_bins_are_impossible():
    def entropy(logits):
        return action_tokens.entropy(action_tokens.log_distribution(logits, 1.0, 2))

    logits = jnp.array([0.0, 0.0, -1.0])
    np.testing.assert_allclose(entropy(logits), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(entropy)(logits), np.zeros(3), atol=1e-6)
