from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import optim
from algos.optim import OptimizerConfig

PARAMS = {"trunk": {"kernel": jnp.ones((2, 2))}, "value_head": {"kernel": jnp.ones(3)}}
GRADIENTS = jax.tree.map(jnp.ones_like, PARAMS)


def step(cfg, *, params=PARAMS, gradients=GRADIENTS, trainable=None, state=None, **extra):
    optimizer = optim.make_optimizer(cfg, trainable)
    state = optimizer.init(params) if state is None else state
    return optimizer.update(gradients, state, params, **({"iteration": 0} | extra))


def test_groups_have_their_own_rates_when_there_is_a_value_head():
    updates, state = step(OptimizerConfig(lr=1e-3, value_lr=1e-2, weight_decay=0.0, eps=1e-8))
    np.testing.assert_allclose(updates["trunk"]["kernel"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["value_head"]["kernel"], -1e-2, rtol=1e-4)
    assert float(state.lr) == pytest.approx(1e-3)
    assert float(state.value_lr) == pytest.approx(1e-2)
    assert float(state.grad_norm) == pytest.approx(7**0.5, rel=1e-6)  # before clipping


def test_steps_equal_optax_adamw_when_nothing_is_clipped():
    cfg = OptimizerConfig(lr=1e-3, value_lr=1e-3, clip_grad=1e6)
    reference = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-5, weight_decay=0.01)
    expected, _ = reference.update(GRADIENTS, reference.init(PARAMS), PARAMS)
    ours, _ = step(cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, expected)


def test_only_the_value_head_moves_when_the_critic_warms_up():
    updates, state = step(OptimizerConfig(), only_value_head=jnp.asarray(True))
    assert (updates["trunk"]["kernel"] == 0).all()
    assert (updates["value_head"]["kernel"] != 0).all()
    assert state.lr == 0.0
    assert float(state.grad_norm) == pytest.approx(3**0.5, rel=1e-6)


def test_frozen_parameters_stay_when_a_filter_says_so():
    updates, state = step(OptimizerConfig(), trainable=lambda path: "value_head" in path)
    assert (updates["trunk"]["kernel"] == 0).all()
    assert (updates["value_head"]["kernel"] != 0).all()
    assert float(state.grad_norm) == pytest.approx(3**0.5, rel=1e-6)
    assert [x.shape for x in jax.tree.leaves(state.adam)] == [(), (3,), (3,)]


def test_moments_are_float32_when_parameters_are_bfloat16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    _, state = step(OptimizerConfig(), params=params)
    assert {x.dtype for x in jax.tree.leaves(state.adam.mu)} == {jnp.dtype("float32")}


def test_gradient_is_untouched_when_its_norm_is_allowed():
    clipped, norm = optim.clip_by_global_norm({"a": jnp.array([3.0, 4.0])}, 5.0)
    assert clipped["a"].tolist() == [3.0, 4.0]
    assert norm == 5.0
    clipped, _ = optim.clip_by_global_norm({"a": jnp.array([3.0, 4.0])}, 1.0)
    np.testing.assert_allclose(clipped["a"], [0.6, 0.8], rtol=1e-6)


def test_schedule_counts_from_the_first_step_when_the_optimizer_restarts():
    cfg = OptimizerConfig(lr=1.0, warmup_iterations=4)
    _, state = step(cfg, iteration=10)
    assert state.lr == 0.0
    _, state = step(cfg, iteration=12, state=state)
    assert state.lr == 0.5


def test_warmup_is_a_share_of_the_whole_when_given_as_ratio():
    cfg = OptimizerConfig(warmup_iterations=-1, warmup_ratio=0.5, total_iterations=8)
    assert optim.learning_rate_factor(cfg, jnp.array(2)) == 0.5


@pytest.mark.parametrize("schedule", get_args(optim.Schedule))
def test_peak_is_reached_when_there_is_no_warmup(schedule):
    cfg = OptimizerConfig(lr=1e-4, schedule=schedule, total_iterations=10, min_lr=1e-6)
    factors = optim.learning_rate_factor(cfg, jnp.arange(11))
    assert float(factors[0]) == pytest.approx(1.0)
    if "cosine" in schedule:
        assert float(factors[10]) == pytest.approx(0.01, rel=1e-4)


def test_problems_are_all_named_when_fields_do_not_fit_together():
    found = optim.problems(OptimizerConfig(lr=0.1, schedule="cosine", min_lr=1.0))
    assert [line.split(":")[0] for line in found] == [
        "config.optim.total_iterations",
        "config.optim.min_lr",
    ]
    assert optim.problems(OptimizerConfig()) == []
