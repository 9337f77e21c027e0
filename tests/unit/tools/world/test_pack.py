"""Packing a world: what is taken from the parts, what is asked for, and what is refused."""

import numpy as np
import pytest

from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import read_preset
from evac_jax.config.world import GroundTruth, World
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.files import cards, start_frames
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.initial_states import make_initial_states
from evac_jax.tools.world import check, pack
from tests.unit.tools.world import folders


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return folders.record(tmp_path_factory.mktemp("recording") / "episodes")


@pytest.fixture(scope="module")
def world(weights, recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "world"
    pack.main([*folders.of(weights), "--starts", str(recording), *folders.TOLD, "--out", str(out)])
    return out


def told(*argv, kind=ConfigError) -> str:
    with pytest.raises(kind) as error:
        pack.main([str(word) for word in argv])
    return str(error.value)


def test_packed_world_is_whole_and_a_run_can_begin_in_it(world, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert check.problems(World.read(str(world))) == []
    flags = [f"--config.world={world}"]
    config = from_config_dict(read_preset("configs/grpo.py:own", flags).to_dict())
    assert config.reward.judged_frames == 2
    assert config.policy.unnorm_key == "miniature"  # the only one that the policy has


def test_starts_are_first_frames_of_training_episodes_then_of_held_out_ones(world):
    card = World.read(str(world)).card
    assert (card.starts.train, card.starts.eval) == ((0, 3), (3, 5))
    source = make_initial_states("npy", str(world / "starts"))
    loaded = source.load(np.arange(5))
    assert loaded.images[:, 0, 0, 0, 0].tolist() == [20, 30, 40, 10, 50]
    assert [source.instructions[task] for task in loaded.task] == [
        INSTRUCTIONS[number % 2] for number in (1, 2, 3, 0, 4)
    ]
    assert source.camera_size == (64, 64)
    assert cards.read(world / "starts")[start_frames.STATES] == [101, 102, 103, 100, 104]


def test_all_that_no_file_tells_is_asked_for_at_once(weights, recording, tmp_path):
    message = told(*folders.of(weights), "--starts", recording, "--out", tmp_path / "w")
    for option in folders.TOLD[::2]:
        assert f"{option}: " in message
    assert "unnorm_key" not in message


def test_two_that_disagree_are_named(weights, recording, tmp_path):
    reward = folders.with_card(
        weights / "reward", tmp_path / "reward", judged_frames=4, chunk=16, sampling={"steps": 1}
    )
    argv = [*folders.of(weights, reward=reward), "--starts", recording, *folders.TOLD]
    message = told(*argv, "--out", tmp_path / "w")
    assert "judged_frames: reward/card.json says 4, --judged_frames says 2" in message
    assert "chunk: world_model/config.json says 8, reward/card.json says 16" in message
    assert "steps" not in message
    assert list(tmp_path.iterdir()) == [reward]


def test_frames_of_another_size_are_refused(weights, tmp_path):
    small = folders.record(tmp_path / "small", size=32)
    argv = [*folders.of(weights), "--starts", small, *folders.TOLD, "--out", tmp_path / "w"]
    expected = "image_size: world_model/config.json says [64, 64], starts says [32, 32]"
    assert expected in told(*argv)


def test_task_that_the_classifier_does_not_know_is_refused(weights, tmp_path):
    other = folders.record(tmp_path / "other", instructions=["open the drawer"])
    argv = [*folders.of(weights), "--starts", other, *folders.TOLD, "--out", tmp_path / "w"]
    message = told(*argv)
    assert "reward/card.json knows the instructions" in message
    assert "'open the drawer'" in message


def test_part_of_another_kind_is_refused(weights, recording, tmp_path):
    swapped = folders.of(weights, reward=weights / "pose_model")
    argv = [*swapped, "--starts", recording, *folders.TOLD, "--out", tmp_path / "w"]
    assert "holds PoseModel, expected RewardNet" in told(*argv, kind=CheckpointError)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--horizon", "12", "horizon: expected a multiple of the chunk of 8, got 12"),
        ("--eta", "2", "imagining.eta: expected 0..1, got 2.0"),
        ("--prompt_length", "3", "prompt"),
        ("--unnorm_key", "robot", "unnorm_key: policy/dataset_statistics.json says 'miniature'"),
    ],
)
def test_value_that_cannot_be_is_refused_before_anything_is_copied(
    weights, recording, tmp_path, option, value, why
):
    argv = [*folders.of(weights), "--starts", recording, *folders.TOLD, option, value]
    assert why in told(*argv, "--out", tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_world_of_libero_is_told_by_the_recordings_card(weights, tmp_path):
    played = {"tasks": [3, 0], "extra_states": True}
    recording = folders.record(tmp_path / "libero", libero=folders.LIBERO | played)
    argv = [*folders.of(weights), "--starts", str(recording), *folders.TOLD]
    out = tmp_path / "w"
    pack.main([*argv, "--ground_truth", "libero", "--out", str(out)])
    card = World.read(str(out)).card
    assert card.ground_truth == GroundTruth("libero", "libero_goal", (3, 0), True, 2, False)
    assert card.cameras[0].crop == (0.1, 0.9, 0.0, 1.0)
    assert card.action_repeat == 2
    assert check.problems(World.read(str(out))) == []


def test_settings_of_libero_are_asked_for_when_no_card_tells(weights, recording, tmp_path):
    argv = [*folders.of(weights), "--starts", recording, *folders.TOLD, "--out", tmp_path / "w"]
    message = told(*argv, "--ground_truth", "libero")
    for option in ("--suite", "--crop", "--oversample", "--reflections", "--action_repeat"):
        assert f"{option}: " in message


def test_miniatures_scenes_need_their_ranges(weights, tmp_path):
    argv = [*folders.of(weights), "--starts", "miniature", *folders.TOLD]
    out = tmp_path / "w"
    assert "--train_starts: LOW,HIGH" in told(*argv, "--out", out)
    pack.main([*argv, "--train_starts", "0,9", "--eval_starts", "9,12", "--out", str(out)])
    assert not (out / "starts").exists()
    assert World.read(str(out)).settings()["env.initial_states"] == "miniature"


def test_range_beyond_the_starts_is_refused(weights, recording, tmp_path):
    argv = [*folders.of(weights), "--starts", recording, *folders.TOLD, "--out", tmp_path / "w"]
    assert "starts: there are 5, ranges go up to 9" in told(*argv, "--eval_starts", "3,9")


def test_other_policy_takes_the_rest_from_a_world(world, weights, tmp_path):
    policy = folders.with_card(
        weights / "policy", tmp_path / "policy", gripper="none", keep_stop_token=True
    )
    out = tmp_path / "w"
    pack.main(["--base", str(world), "--policy", str(policy), "--link", "--out", str(out)])
    old, new = World.read(str(world)).card, World.read(str(out)).card
    assert (new.gripper, new.policy.keep_stop_token) == ("none", True)
    assert (new.horizon, new.judging, new.starts) == (old.horizon, old.judging, old.starts)
    assert new.sha256["reward"] == old.sha256["reward"]
    one, other = (folder / "reward" / "model.safetensors" for folder in (world, out))
    assert one.stat().st_ino == other.stat().st_ino
    assert check.problems(World.read(str(out))) == []


def test_what_a_replaced_part_does_not_tell_is_asked_for_again(world, weights, tmp_path):
    message = told("--base", world, "--policy", weights / "policy", "--out", tmp_path / "w")
    assert "--gripper" in message
    assert "--horizon" not in message


def test_starts_that_are_nowhere_are_told(weights, tmp_path):
    argv = [*folders.of(weights), *folders.TOLD, "--out", tmp_path / "w"]
    message = told(*argv, "--starts", tmp_path / "nope")
    assert "--starts: " in message
    assert "nope: no folder; expected recordings" in message


def test_adapter_is_refused_in_the_place_of_the_policy(world, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    message = told("--base", world, "--policy", adapter, "--out", tmp_path / "w")
    assert "is a LoRA adapter; pack its base policy" in message


def test_folder_that_exists_is_left_alone(weights, recording, tmp_path):
    argv = [*folders.of(weights), "--starts", recording, *folders.TOLD, "--out", tmp_path]
    assert "exists; choose another folder" in told(*argv, kind=DataError)


def test_missing_parts_are_named_when_there_is_no_base(capsys):
    with pytest.raises(SystemExit):
        pack.main(["--reward", "r", "--out", "w"])
    assert "--world_model, --pose_model, --policy, --starts: needed" in capsys.readouterr().err


def test_nothing_is_left_when_packing_breaks_off(weights, recording, tmp_path, monkeypatch):
    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr("evac_jax.files.cards.sha256", full)
    argv = [*folders.of(weights), "--starts", recording, *folders.TOLD, "--out", tmp_path / "w"]
    assert "disk full" in told(*argv, kind=OSError)
    assert not list(tmp_path.iterdir())
