import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policies.base import Policy
from policies.openvla_oft.llama import rotary_tables
from tests.parity.action_codec import tokens_to_actions
from tests.unit.policies.tiny import CONFIG, make_model, make_obs


@functools.partial(jax.jit, static_argnames=("graphdef", "top_k", "greedy"))
def sample(graphdef, state, obs, key, temperature, top_k=-1, greedy=False):
    model = nnx.merge(graphdef, state)
    return model.sample(obs, key, temperature=temperature, top_k=top_k, greedy=greedy)


@functools.partial(jax.jit, static_argnames=("graphdef", "top_k", "order"))
def evaluate(graphdef, state, obs, tokens, temperature, top_k=-1, order="mask_first"):
    model = nnx.merge(graphdef, state)
    return model.evaluate(obs, tokens, temperature=temperature, top_k=top_k, topk_order=order)


@pytest.fixture(scope="module")
def split():
    return nnx.split(make_model())


def test_model_is_a_policy_when_checked_structurally():
    model = make_model()
    assert isinstance(model, Policy)
    assert (model.action_spec.dim, model.action_spec.chunk) == (3, 2)


@pytest.mark.parametrize("top_k", [-1, 5])
def test_evaluate_repeats_the_log_probs_when_given_sampled_tokens(split, top_k):
    obs = make_obs()
    drawn = sample(*split, obs, jax.random.key(1), 1.6, top_k=top_k)
    judged = evaluate(*split, obs, drawn.tokens, 1.6, top_k=top_k)
    np.testing.assert_array_equal(judged.log_probs, drawn.log_probs)
    np.testing.assert_array_equal(judged.values, drawn.values)
    assert drawn.log_probs.shape == (2, 2, 3)
    assert drawn.values.shape == (2, CONFIG.chunk)
    assert np.isfinite(judged.log_probs).all()
    limit = np.log(CONFIG.num_bins if top_k < 0 else top_k)
    assert (np.asarray(judged.entropy) > 0).all()
    assert (np.asarray(judged.entropy) <= limit + 1e-5).all()


def test_actions_equal_the_float64_table_when_rounded_to_float32(split):
    drawn = sample(*split, make_obs(), jax.random.key(1), 1.6)
    exact = tokens_to_actions(
        np.asarray(drawn.tokens), make_model().statistics, CONFIG.first_action_token
    )
    np.testing.assert_array_equal(drawn.actions, exact.astype(np.float32))


def test_greedy_takes_the_likeliest_token_when_asked(split):
    obs = make_obs()
    greedy = sample(*split, obs, jax.random.key(1), 1.0, greedy=True)
    other = evaluate(*split, obs, jnp.full_like(greedy.tokens, CONFIG.first_action_token + 7), 1.0)
    assert (greedy.log_probs >= other.log_probs).all()


def test_result_does_not_change_when_padding_does(split):
    tokens = jnp.full((2, 2, 3), CONFIG.first_action_token + 100)
    short = evaluate(*split, make_obs(padding=0), tokens, 1.0)
    long = evaluate(*split, make_obs(), tokens, 1.0)
    np.testing.assert_allclose(short.log_probs, long.log_probs, atol=1e-5)
    np.testing.assert_allclose(short.values, long.values, atol=1e-5)


def _loss_gradients(model, obs, tokens):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        judged = nnx.merge(graphdef, params, rest).evaluate(obs, tokens, top_k=9)
        finite = jnp.where(jnp.isfinite(judged.log_probs), judged.log_probs, 0.0)
        return finite.mean() + judged.entropy.mean() + judged.values.mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
def test_gradients_agree_and_are_finite_when_layers_are_unrolled_and_rematerialised():
    obs, tokens = make_obs(), jnp.full((2, 2, 3), CONFIG.first_action_token + 100)
    value, gradients = _loss_gradients(make_model(), obs, tokens)
    other = _loss_gradients(make_model(scan_layers=False, remat="full"), obs, tokens)
    np.testing.assert_allclose(value, other[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, other[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_reference_order_cuts_sampled_tokens_when_top_k_is_on(split):
    obs = make_obs()
    drawn = sample(*split, obs, jax.random.key(1), 1.6, top_k=5)
    cut = evaluate(*split, obs, drawn.tokens, 1.6, top_k=5, order="reference")
    assert not np.isfinite(cut.log_probs).all()


def test_stop_token_changes_the_distribution_when_kept(split):
    obs, tokens = make_obs(), jnp.full((2, 2, 3), CONFIG.first_action_token)
    dropped = evaluate(*split, obs, tokens, 1.0)
    with_stop = nnx.split(make_model(keep_stop_token=True))
    kept = evaluate(*with_stop, obs, tokens, 1.0)
    assert np.abs(kept.log_probs - dropped.log_probs).max() > 1e-4
    padded = evaluate(*with_stop, make_obs(padding=6), tokens, 1.0)
    np.testing.assert_allclose(kept.log_probs, padded.log_probs, atol=1e-5)
    np.testing.assert_allclose(kept.values, padded.values, atol=1e-5)


def test_log_probs_stay_float32_when_layers_compute_in_bfloat16(split):
    obs, tokens = make_obs(), jnp.full((2, 2, 3), CONFIG.first_action_token + 30)
    low = nnx.split(make_model(compute_dtype="bfloat16"))
    judged = evaluate(*low, obs, tokens, 1.0)
    exact = evaluate(*split, obs, tokens, 1.0)
    assert judged.log_probs.dtype == judged.values.dtype == jnp.float32
    np.testing.assert_allclose(judged.log_probs, exact.log_probs, atol=0.1)


def test_frequencies_are_rounded_when_the_reference_is_imitated():
    config = dataclasses.replace(CONFIG, hidden_size=64, num_heads=4)  # 10000^(-2/16) = 0.3162
    positions = jnp.array([[0, 1]])
    exact = rotary_tables(config, positions)[1][0, 1, 0, 1]
    config = dataclasses.replace(config, reference_rope_rounding=True)
    rounded = rotary_tables(config, positions)[1][0, 1, 0, 1]
    np.testing.assert_allclose(exact, np.sin(10000 ** (-2 / 16)), atol=1e-6)
    np.testing.assert_allclose(rounded, np.sin(0.31640625), atol=1e-6)


def test_error_names_the_setting_when_the_number_of_cameras_differs():
    obs = make_obs()
    with pytest.raises(ValueError, match="num_images"):
        make_model().sample(obs.replace(images=obs.images[:, :1]), jax.random.key(0))


def test_config_lists_all_problems_when_sizes_do_not_fit():
    with pytest.raises(ValueError, match="patch_size") as error:
        dataclasses.replace(CONFIG, image_size=17, value_type="always")
    assert "value_type" in str(error.value)
