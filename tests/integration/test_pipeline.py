"""Pipeline stages change when something is computed, not what."""

import dataclasses

import jax
import numpy as np
import pytest

from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.evaluate import evaluate
from evac_jax.learner import Learner
from evac_jax.rollout import collect
from evac_jax.shapes import EpisodeShapes
from evac_jax.simulators import Simulators, training_specs
from evac_jax.telemetry.stopwatch import Stopwatch


def play(config, stages: int):
    """Collect one iteration and evaluate, with so many stages; return the shapes expected too."""
    rollout = dataclasses.replace(config.rollout, pipeline_stages=stages, epochs=2)
    config = dataclasses.replace(config, rollout=rollout)
    mesh = sharding.make_mesh(2, 2)
    simulators = Simulators(training_specs(config), mesh, config).wait_until_ready()
    try:
        learner = Learner(config, mesh, EpisodeShapes.of(simulators.spec))
        learner.meet(simulators.spec)
        starts = np.repeat(np.arange(4), 4).reshape(2, 8)
        settings = {"seed": 3, "watch": Stopwatch()}
        collected = collect(learner, simulators, starts, key=jax.random.key(1), **settings)
        judged = evaluate(learner, simulators, np.arange(6), films=1, **settings)
        return collected, judged, learner.batch_shapes
    finally:
        simulators.close()


@pytest.fixture(scope="module")
def one_stage(tiny_config):
    return play(tiny_config, 1)


@pytest.mark.slow
def test_batch_has_the_shapes_that_are_known_before(one_stage):
    (batch, *_), _, expected = one_stage

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds(batch) == kinds(expected)


@pytest.mark.slow
def test_two_stages_give_the_numbers_of_one(tiny_config, one_stage):
    (one, figures, record), judged, _ = one_stage
    (two, same_figures, same_record), same_judged, _ = play(tiny_config, 2)
    for name in ("images", "prompt_tokens", "tokens", "rewards", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)
    np.testing.assert_allclose(one.values, two.values, atol=1e-5)
    assert len(np.unique(np.asarray(one.tokens)[:4, 0], axis=0)) == 4  # a group's members differ
    assert figures == same_figures
    np.testing.assert_array_equal(record.starts, same_record.starts)
    np.testing.assert_array_equal(record.actions, same_record.actions)
    np.testing.assert_array_equal(judged.success, same_judged.success)
    np.testing.assert_array_equal(judged.films[0].frames, same_judged.films[0].frames)
    assert judged.by_task == same_judged.by_task


def test_stages_must_divide_the_environments_of_a_process(tiny_config):
    values = to_dict(tiny_config)
    values["rollout"]["pipeline_stages"] = 3
    with pytest.raises(ConfigError, match=r"pipeline_stages: must divide the 4"):
        from_config_dict(values)
