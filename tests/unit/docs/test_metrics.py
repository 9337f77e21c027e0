"""docs/metrics.md names exactly what the code emits."""

import ast
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import grpo, losses, metrics, ppo
from algos.optim import OptimizerConfig, make_optimizer
from algos.refill import collect_informative
from algos.types import RolloutBatch
from algos.update import init_state
from evac_jax.config.build import default_config
from evac_jax.rollout import Played, env_metrics
from evac_jax.telemetry.writers import NON_FINITE
from evac_jax.train import COMPILATIONS
from evac_jax.twin import Twin
from policies.types import PolicyEvaluation
from tests.unit.fakes import FakeGroundTruth

B, T, K, A, BINS = 4, 2, 2, 3, 5


def _apply(params, obs, tokens):
    logits = jax.nn.log_softmax(params["logits"])
    return PolicyEvaluation(
        log_probs=logits[tokens],
        entropy=jnp.zeros(tokens.shape) - jnp.sum(jnp.exp(logits) * logits),
        values=jnp.zeros(tokens.shape[:2]) + params["value_head"],
    )


def _batch(with_values: bool) -> RolloutBatch:
    return RolloutBatch(
        images=jnp.zeros((B, T, 1, 4, 4, 3), jnp.uint8),
        prompt_tokens=jnp.zeros((B, 3), jnp.int32),
        prompt_mask=jnp.ones((B, 3), bool),
        tokens=jnp.zeros((B, T, K, A), jnp.int32),
        log_probs=jnp.zeros((B, T, K, A)),
        values=jnp.zeros((B, T + 1, K)) if with_values else None,
        rewards=jnp.zeros((B, T, K)),
        terminated=jnp.zeros((B, T, K), bool),
        truncated=jnp.zeros((B, T, K), bool),
    )


def _update_metrics(algorithm, **options) -> set[str]:
    """Names of one update's metrics; shapes only, nothing is compiled or computed."""
    cfg = algorithm.Config(group_size=2, global_batch=4, **options)
    params = {"logits": jnp.zeros(BINS), "value_head": jnp.zeros(())}
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(params, optimizer, keep_reference=True)
    update = algorithm.make_update(_apply, optimizer, cfg)
    batch = _batch(with_values=algorithm is ppo)
    _, figures = jax.eval_shape(update, state, batch, jax.random.key(0))
    return set(figures)


def _decoupled_metrics() -> set[str]:
    x = jnp.zeros((2, 3))
    surrogate, log_weight, left = losses.decoupled_surrogate(
        x, x, x, x, clip_low=0.2, clip_high=0.2
    )
    return set(metrics.decoupled_metrics(surrogate, log_weight, None, left))


def _refill_metrics() -> set[str]:
    played = Played(np.zeros(2, np.int64), np.zeros((2, 1, 1, 1)), np.array([True, False]))
    batch, algo = _batch(with_values=False), grpo.Config(group_size=2)
    return set(collect_informative(lambda number: (batch, {}, played), algo, tries=1)[1])


def _twin_metrics() -> set[str]:
    played = Played(np.arange(2), np.zeros((2, T, K, A), np.float32), np.array([True, False]))
    config = default_config("grpo")
    truth = config.env.initial_states
    options = dataclasses.replace(config.eval, twin_fraction=1.0, ground_truth=truth)
    twin = Twin(dataclasses.replace(config, eval=options), FakeGroundTruth(chunk=K, dim=A))
    return set(twin.check(0, played))


def _first_arguments(path, method: str) -> set[str]:
    """Literal first arguments of all calls of `<something>.method(...)` in a file."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }


def _phases(package) -> set[str]:
    phases = {"step"}
    for name in ("rollout.py", "train.py"):
        for method in ("add", "timed"):
            names = _first_arguments(package / name, method)
            phases |= {p for p in names if isinstance(p, str)}
    return phases | {f"env/{p}" for p in _first_arguments(package / "sim" / "env.py", "_timed")}


@pytest.fixture(scope="module")
def emitted(repository) -> set[str]:
    ones = np.ones(2, np.float32)
    figures = dict.fromkeys(("success_once", "return", "length", "terminated"), ones)
    return (
        _update_metrics(grpo)
        | _update_metrics(ppo, kl_beta=0.1, entropy_bonus=0.1)
        | _decoupled_metrics()
        | set(env_metrics(figures))
        | _twin_metrics()
        | _refill_metrics()
        | {f"time/{phase}" for phase in _phases(repository / "evac_jax")}
        | {NON_FINITE, COMPILATIONS}
    )


@pytest.fixture(scope="module")
def documented(repository) -> list[str]:
    text = (repository / "docs" / "metrics.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def test_every_metric_has_a_formula_when_the_code_emits_it(emitted, documented):
    assert sorted(emitted - set(documented)) == []


def test_every_documented_metric_is_emitted_when_listed_once(emitted, documented):
    assert sorted(set(documented) - emitted) == []
    assert len(documented) == len(set(documented))


PROMISED_BY_GUIDES = {
    "actor": ["loss", "value_loss", "entropy", "grad_norm", "lr"],
    "rollout": ["reward_mean", "reward_std", "episode_length", "success_rate"],
    "env": ["success_rate", "step_reward", "termination_rate"],
}
EMITTED_BY_REFERENCE = {
    "actor": [
        *("policy_loss", "policy_loss_abs", "ratio", "clipped_ratio", "ratio_abs"),
        *("dual_cliped_ratio", "approx_kl", "clip_fraction", "entropy_loss", "total_loss"),
    ],
    "critic": ["lr", "value_loss", "value_clip_ratio", "explained_variance"],
    "rollout": [
        "rewards",
        *(f"{kind}_{of}" for kind in ("advantages", "returns") for of in ("mean", "max", "min")),
    ],
    "env": ["success_once", "return", "episode_len", "reward", "num_trajectories"],
}


@pytest.mark.parametrize("names", [PROMISED_BY_GUIDES, EMITTED_BY_REFERENCE])
def test_names_of_the_reference_are_there_when_training(emitted, names):
    expected = {f"{group}/{name}" for group, members in names.items() for name in members}
    assert sorted(expected - emitted) == []
