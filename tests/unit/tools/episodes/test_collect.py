import argparse
import dataclasses
import errno
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evac_jax.config.build import default_config
from evac_jax.config.schema import PolicyConfig
from evac_jax.devices import found
from evac_jax.errors import CheckpointError, ConfigError, DataError, StorageError
from evac_jax.files import recordings
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

    def actions(folder, adapter=""):
        policy = PolicyConfig(
            str(tmp_path / folder), temperature=0, max_prompt_length=28, lora_adapter=adapter
        )
        return PolicyPlayer(policy).play(scenes, 8, seed=0)[0]

    assert not np.array_equal(actions("adapter"), actions("base"))
    named = actions("base", str(tmp_path / "adapter"))
    np.testing.assert_array_equal(named, actions("adapter"))
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


def recording_to(out):
    """The configuration that records two episodes of the miniature into `out`."""
    config = default_config("grpo")
    return dataclasses.replace(
        config,
        collect=dataclasses.replace(config.collect, out=str(out), episodes=2, mix="random=1"),
        eval=dataclasses.replace(config.eval, ground_truth="miniature"),
        env=dataclasses.replace(config.env, max_episode_steps=8),
    )


def test_place_that_cannot_be_written_is_refused_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "collect", None)  # nothing is played
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"is a file, .*set --config\.collect\.out"):
        collect.run(recording_to(tmp_path / "file" / "x"))
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=r"collect\.out: expected a new folder, got '.*/here'"):
        collect.run(recording_to(tmp_path / "here"))


def test_name_that_no_folder_can_have_is_told(tmp_path):
    with pytest.raises(StorageError, match="File name too long"):
        collect.run(recording_to(tmp_path / ("x" * 300)))


@pytest.mark.parametrize("file", [None, "out.partial/frames.raw"])
def test_disk_that_fails_in_the_middle_is_told(tmp_path, monkeypatch, file):
    def fail(*_, **__):
        reason, place = (errno.EIO, str(tmp_path / file)) if file else (errno.ENOSPC, None)
        raise OSError(reason, os.strerror(reason), place)

    monkeypatch.setattr(recordings.EpisodeWriter, "add", fail)
    with pytest.raises(StorageError, match=r"out': cannot write .*make room"):
        collect.run(recording_to(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_robots(weights, tmp_path):
    """A policy with statistics of two names; those of the first are a tenth of the others."""
    folder = shutil.copytree(weights / "policy", tmp_path / "policy")
    path = folder / "dataset_statistics.json"
    (entry,) = json.loads(path.read_text()).values()
    action = entry["action"]
    smaller = action | {name: [bound / 10 for bound in action[name]] for name in ("q01", "q99")}
    path.write_text(json.dumps({"small": {"action": smaller}, "large": entry}))
    return folder


def playing(folder, out, **policy):
    """The configuration that records two episodes of a policy into `out`."""
    config = recording_to(out)
    policy = {"checkpoint": str(folder), "max_prompt_length": 28} | policy
    return dataclasses.replace(
        config,
        policy=PolicyConfig(**policy),
        collect=dataclasses.replace(config.collect, mix="policy=1"),
    )


def test_policy_plays_with_the_statistics_that_the_configuration_names(two_robots, tmp_path):
    moves = []
    for key in ("small", "large"):
        collect.run(playing(two_robots, tmp_path / key, unnorm_key=key))
        moves.append(np.abs(recordings.load(tmp_path / key).actions[:, :6]).max())
    assert moves[1] > 5 * moves[0]


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("", r"policy\.unnorm_key: expected one of \['small', 'large'\], .*, got ''; set it"),
        ("other", r"'other' .*is not among the checkpoint's statistics \['large', 'small'\]"),
    ],
)
def test_statistics_that_are_not_named_or_not_there_are_refused(two_robots, tmp_path, key, why):
    with pytest.raises(CheckpointError, match=why):
        collect.run(playing(two_robots, tmp_path / "out", unnorm_key=key))
    assert not (tmp_path / "out").exists()


def test_command_names_the_statistics_of_its_policies(two_robots, tmp_path, monkeypatch):
    out, mix = tmp_path / "out", f"policy:{two_robots}@0=1"
    command = ["collect", "--out", str(out), "--episodes", "1", "--steps", "8", "--mix", mix]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(CheckpointError, match=r"or --unnorm_key of tools\.episodes\.collect"):
        collect.main()
    monkeypatch.setattr("sys.argv", [*command, "--unnorm_key", "large"])
    collect.main()
    assert recordings.load(out).card["command"].endswith("--unnorm_key large")


def test_large_policy_is_refused_when_it_would_leave_a_gpu_unused(
    two_robots, tmp_path, monkeypatch
):
    unused = dataclasses.replace(found.look(), gpus=1, jax_platform="cpu")
    monkeypatch.setattr(found, "look", lambda: unused)
    monkeypatch.setattr(found, "LARGE", 10)
    with pytest.raises(ConfigError, match=r"policy\.checkpoint: .* computed on the CPU"):
        collect.run(playing(two_robots, tmp_path / "out", unnorm_key="small"))


def test_share_or_temperature_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="shares of 0 or more, got 'noisy=nan'"):
        collect.parse_mix("noisy=nan")
    with pytest.raises(DataError, match="expected policy:FOLDER@TEMPERATURE"):
        collect.collect(tmp_path / "out", 2, {"policy:x@nan": 1.0})
