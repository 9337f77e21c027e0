import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algos import ALGORITHMS, grpo, policy_gradient, ppo, update
from algos.optim import OptimizerConfig, make_optimizer
from tests.unit.algos import toy

OPTIM = OptimizerConfig(lr=1e-2, value_lr=1e-2, weight_decay=0.0)
ALONE = update.Placement()
GRPO = grpo.Config(group_size=4, global_batch=8)
PPO = ppo.Config(
    global_batch=8, reward_type="chunk_level", critic_warmup_updates=2, value_clip=10.0
)


@functools.cache  # tests that share a configuration share its compilation
def compiled(algorithm, cfg, optim, placement):
    optimizer = make_optimizer(optim)
    step = jax.jit(algorithm.make_update(toy.apply, optimizer, cfg, placement))
    return optimizer, step


def learn(
    cfg,
    batch,
    params,
    *,
    optim=OPTIM,
    algorithm=grpo,
    steps=1,
    ref=False,
    placement=ALONE,
):
    optimizer, step = compiled(algorithm, cfg, optim, placement)
    state = jax.jit(lambda p: update.init_state(p, optimizer, keep_reference=ref))(params)
    metrics = {}
    for index in range(steps):
        state, metrics = step(state, batch, jax.random.key(index))
    return state, {name: float(metric.mean()) for name, metric in metrics.items()}


def largest_move(before, after):
    moves = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before, after)
    return float(max(jax.tree.leaves(moves)))


def test_micro_batches_change_nothing_when_accumulated():
    params = toy.params()
    batch = toy.rollout(params, on_policy=False)
    cfg = dataclasses.replace(GRPO, length_weighting=False, entropy_bonus=0.01)
    whole, figures = learn(cfg, batch, params)
    cut, cut_figures = learn(dataclasses.replace(cfg, micro_batch=2), batch, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        whole.params,
        cut.params,
    )
    assert figures["actor/loss"] == pytest.approx(cut_figures["actor/loss"], rel=1e-4, abs=1e-6)
    assert figures["actor/total_loss"] == figures["actor/loss"]


def test_parameters_stay_when_all_advantages_are_zero():
    params = toy.params()
    batch = toy.rollout(params, rewards=jnp.zeros((toy.B, toy.T, toy.K)))
    state, metrics = learn(GRPO, batch, params)
    assert largest_move(params, state.params) == 0.0
    assert metrics["actor/grad_norm"] == 0.0
    assert metrics["rollout/group_std_zero_fraction"] == 1.0


def test_ratio_is_one_in_the_first_batch_when_sampler_and_learner_agree():
    params = toy.params()
    _, metrics = learn(GRPO, toy.rollout(params), params)
    assert metrics["actor/ratio_abs_first"] < 1e-6


def test_step_is_skipped_and_counted_when_the_loss_is_not_finite():
    params = toy.params()
    batch = toy.rollout(params)
    bad = batch.replace(log_probs=batch.log_probs.at[0, 0, 0, 0].set(jnp.nan))
    state, metrics = learn(GRPO, bad, params)
    assert (int(state.updates), int(state.skipped), int(state.step)) == (1, 1, 1)
    assert metrics["actor/skipped_updates"] == 1.0
    undefined = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert undefined <= {"actor/ratio_abs_first"}  # of the batch that was skipped
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((state.params, state.opt_state)))


def test_step_is_skipped_without_decay_when_every_group_is_filtered():
    params = toy.params()
    batch = toy.rollout(params, rewards=jnp.zeros((toy.B, toy.T, toy.K)))
    cfg = dataclasses.replace(GRPO, filter_rewards=True)
    state, metrics = learn(cfg, batch, params, optim=OptimizerConfig(weight_decay=0.5))
    assert largest_move(params, state.params) == 0.0
    assert (int(state.updates), int(state.skipped)) == (0, 2)
    assert (metrics["actor/empty_updates"], metrics["actor/skipped_updates"]) == (2.0, 0.0)
    assert metrics["rollout/filtered_group_fraction"] == 1.0
    assert metrics["rollout/valid_token_fraction"] == 0.0


def test_rewarded_tokens_become_likelier_when_grpo_learns():
    params = toy.params()
    first = jnp.zeros((toy.B, toy.T, toy.K)).at[::2, 0, 0].set(1.0)
    batch = toy.rollout(params, rewards=first)
    state, _ = learn(GRPO, batch, params, steps=3)
    obs = update.observations(batch, jnp.arange(16))
    samples = update.make_samples(batch, grpo.advantages(batch, GRPO)[0])
    gain = toy.apply(state.params, obs, samples.tokens).log_probs - samples.old_log_probs
    weighted = gain * samples.advantages[..., None] * samples.valid[..., None]
    assert float(weighted.sum()) > 0.0
    assert (int(state.updates), int(state.step)) == (6, 3)


def test_trunk_waits_when_the_critic_warms_up():
    params = toy.params(with_value=True)
    batch = toy.rollout(params)
    warm, metrics = learn(PPO, batch, params, algorithm=ppo)
    assert largest_move(params["head"], warm.params["head"]) == 0.0
    assert largest_move(params["value_head"], warm.params["value_head"]) > 0.0
    assert metrics["actor/lr"] == metrics["actor/policy_loss"] == 0.0
    after, metrics = learn(PPO, batch, params, algorithm=ppo, steps=2)
    assert largest_move(params["head"], after.params["head"]) > 0.0
    assert metrics["actor/lr"] == pytest.approx(OPTIM.lr)
    assert int(after.opt_state.start) == 1  # the schedule began when the policy did
    assert int(after.opt_state.adam.count) == 2


def test_value_loss_falls_when_ppo_learns():
    params = toy.params(with_value=True)
    batch = toy.rollout(params, rewards=jnp.ones((toy.B, toy.T, toy.K)))
    _, before = learn(PPO, batch, params, algorithm=ppo)
    _, after = learn(PPO, batch, params, algorithm=ppo, steps=30)
    assert after["critic/value_loss"] < 0.7 * before["critic/value_loss"]
    assert after["actor/value_loss"] == after["critic/value_loss"]
    assert {"critic/explained_variance", "critic/lr", "critic/value_clip_ratio"} <= set(after)


def test_kl_is_part_of_the_loss_when_it_is_penalised():
    params = toy.params()
    batch = toy.rollout(params, rewards=jnp.zeros((toy.B, toy.T, toy.K)), on_policy=False)
    moved = toy.params(seed=1)
    cfg = dataclasses.replace(GRPO, kl_beta=2.0)
    optimizer, step = compiled(grpo, cfg, OPTIM, ALONE)
    state = update.init_state(params, optimizer, keep_reference=True).replace(params=moved)
    state, metrics = step(state, batch, jax.random.key(0))
    assert metrics["actor/kl_loss"].mean() > 0.0
    assert float(metrics["actor/loss"].mean()) == pytest.approx(
        2.0 * float(metrics["actor/kl_loss"].mean()), rel=1e-5
    )
    with pytest.raises(ValueError, match="ref_params"):
        learn(cfg, batch, params)


def test_sharded_inputs_give_the_same_update_when_spread_over_devices():
    devices = np.array(jax.devices()[: 4 if len(jax.devices()) >= 4 else 1])
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    params = toy.params()
    batch = toy.rollout(params, on_policy=False)
    alone, _ = learn(GRPO, batch, params)
    spread, _ = learn(
        GRPO,
        jax.device_put(batch, sharding),
        params,
        placement=update.Placement(
            rows=lambda tree: jax.lax.with_sharding_constraint(tree, sharding)
        ),
    )
    assert largest_move(alone.params, spread.params) < 1e-5


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
@pytest.mark.parametrize("decoupled", [False, True])
def test_copies_of_the_parameters_give_the_update_of_one(kl_beta, decoupled):
    params = toy.params()
    batch = toy.rollout(params, on_policy=False)
    cfg = dataclasses.replace(GRPO, micro_batch=4, kl_beta=kl_beta, decoupled=decoupled)
    alone, figures = learn(cfg, batch, params, ref=True)
    spread, more = learn(cfg, batch, params, ref=True, placement=update.Placement(copies=2))
    assert largest_move(params, alone.params) > 1e-3
    assert largest_move(alone.params, spread.params) < 1e-5
    assert more == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_a_micro_batch_that_copies_cannot_share_is_refused():
    params = toy.params()
    with pytest.raises(ValueError, match=r"micro_batch: expected a multiple of the 3 copies"):
        learn(GRPO, toy.rollout(params), params, placement=update.Placement(copies=3))


def test_truncated_ends_keep_their_value_when_asked():
    params = toy.params(with_value=True)
    batch = toy.rollout(params)
    batch = batch.replace(values=jnp.ones_like(batch.values), rewards=jnp.zeros_like(batch.rewards))
    options = {"normalize_advantages": False, "gamma": 1.0, "gae_lambda": 1.0}
    cut, _ = ppo.advantages(batch, dataclasses.replace(PPO, **options))
    kept, _ = ppo.advantages(batch, dataclasses.replace(PPO, bootstrap_truncated=True, **options))
    ended = batch.terminated.any(axis=(1, 2))
    assert (cut.returns[:, 0, 0] == 0.0).all()
    assert kept.returns[:, 0, 0].tolist() == [0.0 if e else 1.0 for e in ended.tolist()]


def test_values_of_the_wrong_level_are_refused_when_advantages_need_them():
    params = toy.params(with_value=True)
    cfg = dataclasses.replace(PPO, reward_type="action_level")
    with pytest.raises(ValueError, match="value_head"):
        ppo.advantages(toy.rollout(params), cfg)
    samples = update.make_samples(
        toy.rollout(toy.params()), grpo.advantages(toy.rollout(toy.params()), GRPO)[0]
    )
    obs = update.observations(toy.rollout(toy.params()), jnp.arange(16))
    seen = toy.apply(toy.params(), obs, samples.tokens)
    weights = policy_gradient.loss_weights(samples, GRPO, toy.T * toy.K)
    with pytest.raises(ValueError, match="value head"):
        ppo.loss(seen, samples, weights, PPO)


def test_sizes_that_do_not_divide_are_refused():
    params = toy.params()
    with pytest.raises(ValueError, match="global_batch"):
        learn(dataclasses.replace(GRPO, global_batch=12), toy.rollout(params), params)


def test_everything_trains_when_episodes_have_no_ends():
    params = toy.params()
    batch = toy.rollout(params)
    for name in ("auto_reset", "ignore_terminations"):
        targets, metrics = grpo.advantages(batch, dataclasses.replace(GRPO, **{name: True}))
        assert targets.valid is None
        assert metrics["rollout/episode_length"].mean() == toy.T * toy.K
    cfg = dataclasses.replace(GRPO, auto_reset=True, filter_rewards=True, filter_high=0.0)
    targets, _ = grpo.advantages(batch, cfg)
    assert targets.valid.shape == batch.rewards.shape


@pytest.mark.parametrize("module", [grpo, ppo])
def test_problems_are_all_named_when_fields_do_not_fit_together(module):
    cfg = module.Config(
        logprob_type="chunk_level",
        loss_agg="seq_mean_token_sum",
        decoupled=True,
        clip_log_ratio_max=1.0,
        filter_rewards=True,
        filter_low=0.5,
        filter_high=0.4,
        micro_batch=3,
    )
    found = module.problems(cfg, num_samples=100, reward_coefficient=0.2)
    names = ("logprob_type", "loss_agg", "decoupled", "filter_low", "micro_batch", "global_batch")
    assert {line.split(":")[0] for line in found} == {f"config.algo.{name}" for name in names}
    assert module.problems(module.Config()) == []


def test_bootstrap_of_truncated_episodes_is_refused_when_they_restart_by_themselves():
    (found,) = ppo.problems(ppo.Config(bootstrap_truncated=True, auto_reset=True))
    assert found.startswith("config.algo.bootstrap_truncated: expected False with auto_reset")
    assert sorted(ALGORITHMS) == ["grpo", "ppo"]


def test_decoupling_changes_nothing_for_the_policy_that_acted():
    params = toy.params()
    batch = toy.rollout(params)
    plain, _ = learn(GRPO, batch, params)
    decoupled, metrics = learn(dataclasses.replace(GRPO, decoupled=True), batch, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain.params, decoupled.params
    )
    assert metrics["actor/behav_approx_kl"] == pytest.approx(0.0, abs=1e-6)


def test_decoupled_ratios_are_to_the_policy_at_the_start_of_the_update():
    params = toy.params()
    batch = toy.rollout(params, on_policy=False)
    _, plain = learn(GRPO, batch, params)
    cfg = dataclasses.replace(GRPO, decoupled=True, micro_batch=2)
    _, decoupled = learn(cfg, batch, params)
    assert plain["actor/ratio_abs_first"] > 0.1
    assert decoupled["actor/ratio_abs_first"] == pytest.approx(0.0, abs=1e-5)


def test_decoupling_drops_entries_that_the_older_policy_hardly_ever_did():
    params = toy.params()
    batch = toy.rollout(params)
    rare = batch.replace(log_probs=batch.log_probs - 3.0)  # every token by e^3
    cfg = dataclasses.replace(GRPO, decoupled=True, logprob_type="action_level")
    state, metrics = learn(cfg, rare, params)
    assert metrics["actor/behav_clip_fraction"] == 1.0
    assert metrics["actor/policy_loss"] == 0.0
    state, metrics = learn(dataclasses.replace(cfg, behave_weight_threshold=None), rare, params)
    assert metrics["actor/behav_clip_fraction"] == 0.0
    assert largest_move(params, state.params) > 0.0
