import argparse
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evac_jax.config.build import default_config
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.miniature import render, scene
from evac_jax.tools.episodes import collect
from evac_jax.tools.episodes.policy_player import PolicyPlayer

MIX = {"expert": 0.5, "near_miss": 0.25, "random": 0.25}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings") / "first"
    return folder, collect.collect(folder, 12, MIX, seed=3, image_size=32)


def test_recording_holds_what_the_dynamics_give(recording):
    _, data = recording
    scenes = scene.sample_scenes(collect.FIRST_SCENE + 3_000_000 + np.arange(12))
    poses, actions = data.stacked("poses"), data.stacked("actions")
    np.testing.assert_array_equal(poses[:, 0], scenes.pose)
    np.testing.assert_array_equal(data.task, scenes.task)
    for t in range(32):
        scenes = scene.step(scenes, actions[:, t])
        np.testing.assert_array_equal(poses[:, t + 1], scenes.pose)
    np.testing.assert_array_equal(data.stacked("frames")[:, -1, 0], render.render(scenes, 32))
    np.testing.assert_array_equal(data.stacked("success")[:, -1], scene.is_success(scenes))


def test_start_names_the_scene(recording):
    _, data = recording
    pictures = render.render(scene.sample_scenes(data.start), 32)
    np.testing.assert_array_equal(data.frames[data.first, 0], pictures)


def test_sources_have_their_shares_and_the_expert_succeeds(recording):
    _, data = recording
    assert np.bincount(data.source).tolist() == [6, 3, 3]
    assert data.sources == tuple(MIX)
    assert data.success_once()[data.source == 0].all()


def test_same_arguments_give_the_same_files(recording, tmp_path):
    _, data = recording
    again = collect.collect(tmp_path / "again", 12, MIX, seed=3, image_size=32)
    assert again.card["sha256"] == data.card["sha256"]


def test_existing_folder_and_wrong_mixture_are_refused(recording, tmp_path):
    folder, _ = recording
    with pytest.raises(DataError, match="exists"):
        collect.collect(folder, 4, MIX)
    with pytest.raises(DataError, match="no such kind"):
        collect.collect(tmp_path / "x", 4, {"perfect": 1.0})
    with pytest.raises(DataError, match="TEMPERATURE"):
        collect.collect(tmp_path / "x", 4, {"policy:here@warm": 1.0})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("player", "parts"),
    [
        ("policy:a", ("a", 1.0)),
        ("policy:a@0.5", ("a", 0.5)),
        ("policy:a@b/c@0", ("a@b/c", 0.0)),
        ("policy:a@b", None),
    ],
)
def test_last_at_of_a_policy_begins_its_temperature(player, parts):
    if parts is None:
        with pytest.raises(DataError, match="expected policy:FOLDER@TEMPERATURE"):
            collect._policy(player)
    else:
        assert collect._policy(player) == parts


def test_a_policy_plays_the_actions_that_were_recorded(weights, tmp_path):
    kind = f"policy:{weights / 'policy'}@0.5"
    data = collect.collect(tmp_path / "data", 3, {kind: 1.0})
    assert data.sources == ("policy:policy@0.5",)
    actions, poses = data.stacked("actions"), data.stacked("poses")
    assert set(np.unique(actions[:, :-1, 6])) <= {-1.0, 0.0, 1.0}
    after = scene.step(scene.sample_scenes(data.start), actions[:, 0])
    np.testing.assert_array_equal(poses[:, 1], after.pose)


def test_an_adapter_plays_on_the_base_beside_it(weights, tmp_path):
    from policies.openvla_oft import peft
    from policies.openvla_oft.import_hf import load_policy

    shutil.copytree(weights / "policy", tmp_path / "base")
    model = load_policy(tmp_path / "base", unnorm_key="", lora_rank=2).model
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "b":
            value[...] = jnp.ones_like(value[...])
    peft.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    scenes = scene.sample_scenes(np.arange(2))

    def actions(folder):
        return PolicyPlayer(tmp_path / folder, temperature=0).play(scenes, 8, seed=0)[0]

    assert not np.array_equal(actions("adapter"), actions("base"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base"):
        actions("adapter")


def test_configuration_without_a_folder_is_refused():
    config = default_config("grpo")
    with pytest.raises(ConfigError, match=r"collect\.out"):
        collect.run(config)
    wanted = dataclasses.replace(config.collect, out="x")
    with pytest.raises(ConfigError, match="ground_truth"):
        collect.run(dataclasses.replace(config, collect=wanted))


def test_share_or_temperature_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="shares of 0 or more, got 'noisy=nan'"):
        collect.parse_mix("noisy=nan")
    with pytest.raises(DataError, match="expected policy:FOLDER@TEMPERATURE"):
        collect.collect(tmp_path / "out", 2, {"policy:x@nan": 1.0})
