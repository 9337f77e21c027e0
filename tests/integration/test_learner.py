"""The update is compiled before there is anything to learn from."""

import dataclasses
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evac_jax import programs
from evac_jax.bridge.types import EnvSpec
from evac_jax.devices import sharding
from evac_jax.errors import ConfigError
from evac_jax.learner import Learner
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.policy_import import policy_sizes
from evac_jax.shapes import expected_episode
from policies.openvla_oft.import_hf import load_config
from policies.spec import ActionSpec

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def learner(tiny_config):
    return Learner(tiny_config, sharding.make_mesh(2, 2), expected_episode(tiny_config))


def an_iteration(learner):
    """Return episodes in which nothing happens, and the key of their update."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), learner.batch_shapes)
    return learner.put(batch), jax.random.key(1)


def test_update_is_compiled_once_and_beside_the_main_thread(learner):
    iteration, compiled_by = an_iteration(learner), []

    def listen(event, _seconds, **_):
        compiled_by.extend([threading.current_thread()] if event == COMPILED else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        learner.begin_to_compile()
        learner.start_update(*iteration)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled_by) == 1
    assert compiled_by[0] is not threading.main_thread()


def test_programs_made_from_shapes_are_the_learners_own(tiny_config, learner):
    mesh, sizes = sharding.make_mesh(2, 2), load_config(Path(tiny_config.policy.checkpoint))
    sizes = policy_sizes(tiny_config.policy, sizes, chunk=8, num_images=1)
    made = tiny_config, mesh, sizes, expected_episode(tiny_config)

    def text(program, arguments):
        lowered = program.lower(*arguments).as_text()
        return re.sub(r'dense<"0x[0-9A-F]+">', "", lowered)  # the checkpoint's action statistics

    update, (state, rest, batch, key) = programs.abstract_update(*made)
    arguments = (learner.state, learner._rest, batch, key)
    assert text(learner._update, arguments) == text(update, (state, rest, batch, key))
    sample, (params, rest, *asked) = programs.abstract_sample(*made)
    arguments = (learner.state.params, learner._rest, *asked)
    assert text(learner._sample, arguments) == text(sample, (params, rest, *asked))


def test_what_goes_wrong_beside_the_main_thread_is_raised_by_the_update(learner, monkeypatch):
    class Broken:
        def lower(self, *_):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(learner, "_update", Broken())
    learner.begin_to_compile()
    with pytest.raises(RuntimeError, match="no such instruction"):
        learner.update(*an_iteration(learner))


def test_simulators_with_other_actions_or_episodes_are_refused(tiny_config, learner):
    frames = expected_episode(tiny_config).image_shape
    env = EnvSpec(8, frames, 8, ActionSpec(), INSTRUCTIONS, 1, 16)
    learner.meet(env)
    with pytest.raises(ConfigError, match="disagree about actions"):
        learner.meet(dataclasses.replace(env, action=ActionSpec(chunk=4)))
    with pytest.raises(ConfigError, match=r"expected EpisodeShapes.*max_steps=16.*max_steps=24"):
        learner.meet(dataclasses.replace(env, max_episode_steps=24))


def test_prompt_that_is_too_long_is_refused(tiny_config, learner):
    frames = expected_episode(tiny_config).image_shape
    env = EnvSpec(8, frames, 8, ActionSpec(), INSTRUCTIONS, 1, 16)
    longer = dataclasses.replace(env, instructions=(INSTRUCTIONS[0] * 9,))
    with pytest.raises(ConfigError, match=r"config\.policy: .*raise policy\.max_prompt_length"):
        learner.meet(env, longer)


def test_prompts_are_those_of_the_simulator_that_names_the_tasks(tiny_config, learner):
    frames = expected_episode(tiny_config).image_shape
    env = EnvSpec(2, frames, 8, ActionSpec(), INSTRUCTIONS, 1, 16)
    real = dataclasses.replace(env, instructions=INSTRUCTIONS[::-1], max_episode_steps=24)
    learner.meet(env, real)

    def asked(spec):
        step = SimpleNamespace(
            frames=jnp.zeros((2, *frames), jnp.uint8),
            result=SimpleNamespace(task=np.array([0, 1])),
            instructions=spec.instructions,
        )
        return np.asarray(learner.observe(step).prompt_tokens)

    assert (asked(env)[0] != asked(env)[1]).any()
    np.testing.assert_array_equal(asked(real), asked(env)[::-1])
    with pytest.raises(ConfigError, match="disagree about actions"):
        learner.meet(env, dataclasses.replace(real, action=ActionSpec(chunk=4)))


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_policy_is_not_sound_when_a_parameter_has_diverged(learner, value):
    assert learner.is_sound()
    state = learner.state
    learner.state = state.replace(params=jax.tree.map(lambda x: x * value, state.params))
    try:
        assert not learner.is_sound()
    finally:
        learner.state = state
