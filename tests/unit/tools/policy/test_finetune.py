import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from evac_jax.devices import found
from evac_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from evac_jax.files import recordings
from evac_jax.tools.policy import data as policy_data
from evac_jax.tools.policy import finetune
from evac_jax.tools.policy import train as train_policy
from policies.openvla_oft.action_tokens import (
    ActionStatistics,
)
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.import_hf import load_policy, read_norm_stats
from policies.openvla_oft.model import OpenVLAOFT
from tests.parity.action_codec import actions_to_tokens, tokens_to_actions
from tests.unit.policies.tiny import CONFIG
from tests.unit.tools import tiny_recording

IDENTITY = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [False] * 7}
RANK = ["--lora_rank", "2", "--lora_alpha", "4"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return tiny_recording.write(tmp_path_factory.mktemp("data") / "noise")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    config = dataclasses.replace(CONFIG, action_dim=7, num_images=1, value_type="none")
    folder = tmp_path_factory.mktemp("policy") / "start"
    model = OpenVLAOFT(config, rngs=nnx.Rngs(0))
    return create_policy_folder(
        model, folder, tasks=["do it"], norm_stats={"other": {"action": IDENTITY}}
    )


def _command(start, recording, out, *more):
    folders = ["--start", str(start), "--data", str(recording), "--out", str(out)]
    options = "--unnorm_key robot --chunk 2 --steps 8 --batch 4 --lr 0.02 --save_every 4"
    return [*folders, *options.split(), *more]


@pytest.fixture(scope="module")
def tuned(start, recording, tmp_path_factory):
    """A run that was stopped after its first save, started with another rank, then resumed."""
    out = tmp_path_factory.mktemp("tuned") / "policy"
    save = finetune.save_progress

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "save_progress", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_policy.main(_command(start, recording, out, *RANK))
    assert not out.exists()
    with pytest.raises(CheckpointError, match="lora_rank was 2 and is 4"):
        train_policy.main(_command(start, recording, out, "--lora_rank", "4", "--lora_alpha", "4"))
    train_policy.main(_command(start, recording, out, *RANK))
    return out


@pytest.mark.parametrize("option", ["--start", "--sizes"])
def test_large_policy_is_refused_when_it_would_leave_a_gpu_unused(
    start, recording, tmp_path, monkeypatch, option
):
    unused = dataclasses.replace(found.look(), gpus=1, jax_platform="cpu")
    monkeypatch.setattr(found, "look", lambda: unused)
    monkeypatch.setattr(found, "LARGE", 10)
    monkeypatch.setattr(train_policy, "finetune", lambda args: None)
    command = _command(start, recording, tmp_path / "out")
    if option == "--sizes":
        command[:2] = ["--sizes", "libero_small"]
    with pytest.raises(ConfigError, match=rf"{option}: .*; or set --cpu_beside_gpu"):
        train_policy.main(command)
    train_policy.main([*command, "--cpu_beside_gpu"])


def test_chunk_holds_the_frame_it_is_decided_on_and_the_actions_that_exist(recording):
    data = recordings.load(recording)
    chunks = policy_data.Chunks(data, 3, {"action": IDENTITY}, "none")
    assert len(chunks) == sum(-(-n // 3) for n in data.length)
    batch = chunks.read(np.arange(4))  # an episode of 3 actions, then one of 8
    np.testing.assert_array_equal(batch.valid, [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(batch.frames[2], data.frames[data.first[1] + 3])
    np.testing.assert_array_equal(batch.actions[2], data.actions[data.first[1] + 3 :][:3])


def test_policy_says_recorded_actions_when_it_says_the_labels(recording):
    data = recordings.load(recording)
    entry = policy_data.action_statistics(data, "libero")
    assert entry["num_transitions"] == data.length.sum()
    batch = policy_data.Chunks(data, 3, entry, "libero").read(np.arange(3))
    statistics = ActionStatistics.from_norm_stats({"robot": entry}, "robot")
    tokens = actions_to_tokens(batch.actions, ActionStatistics.identity(7), 0)
    said = tokens_to_actions(tokens, statistics, 0)
    low, high = statistics.low[:6], statistics.high[:6]
    wanted = data.actions[data.first[0] :][:3]
    np.testing.assert_allclose(said[0, :, :6], np.clip(wanted[:, :6], low, high), atol=5e-3)
    np.testing.assert_allclose(said[0, :, 6], (1 - wanted[:, 6]) / 2, atol=5e-3)
    inside = (data.actions[: data.length[0], :6] >= low).mean()
    assert inside > 0.9


def test_merged_folder_is_the_start_with_the_saved_adapter_and_nothing_else_changed(start, tuned):
    base, merged = load_file(start / "model.safetensors"), load_file(tuned / "model.safetensors")
    pairs = load_file(tuned / "adapter" / "adapter_model.safetensors")
    adapted = {
        name.removeprefix("base_model.model.").replace(".lora_B", "")
        for name, tensor in pairs.items()
        if ".lora_B." in name and tensor.any()
    }
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == adapted
    assert len(changed) > 20
    again = load_policy(start, unnorm_key="", lora_adapter=tuned / "adapter", chunk=2).model
    kernel = again.llama.layers.q_proj.kernel[...][1].T
    expected = merged["language_model.model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(kernel, expected, atol=1e-6)


def test_statistics_stand_beside_those_of_the_start_and_the_card_tells_the_scores(tuned):
    stats = read_norm_stats(tuned)
    assert set(stats) == {"other", "robot"}
    assert stats["robot"]["action"]["mask"] == [True] * 6 + [False]
    card = json.loads((tuned / "card.json").read_text())
    assert (card["gripper"], card["unnorm_key"], card["chunk"]) == ("libero", "robot", 2)
    assert json.loads((tuned / "adapter" / "card.json").read_text()) == card
    scores = card["scores"]
    assert scores["step"] == 8
    assert 0 <= scores["token_accuracy"] <= 1
    assert 0 < scores["loss"] < 10


def test_resumed_run_repeats_an_unbroken_one(start, recording, tuned, tmp_path):
    train_policy.main(_command(start, recording, tmp_path / "policy", *RANK))
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (tuned, tmp_path / "policy")
    )
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_run_is_saved_before_it_is_scored_and_then_scored_alone(
    start, recording, tuned, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError("a test")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "validate", fail)
        with pytest.raises(OSError, match="a test"):
            train_policy.main(_command(start, recording, tmp_path / "policy", *RANK))
    with safe_open(tmp_path / "policy.progress.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["facts"]) == {"step": 8, "history": []}
    monkeypatch.setattr(finetune, "check_trained", lambda *_: pytest.fail("trained again"))
    train_policy.main(_command(start, recording, tmp_path / "policy", *RANK))
    cards = [json.loads((f / "card.json").read_text()) for f in (tuned, tmp_path / "policy")]
    assert cards[0]["history"] == cards[1]["history"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_rows_that_fill_the_last_batch_up_do_not_count(recording):
    data = recordings.load(recording)
    chunks = policy_data.Chunks(data, 3, {"action": IDENTITY}, "none")
    prompts = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)

    def score(obs, actions, valid, goals):
        return np.array([(actions[..., 0] * valid).sum(), 0, valid.sum()])

    one, other = (
        finetune.validate(score, chunks, prompts, size)["loss"] for size in (len(chunks), 7)
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_episodes_of_named_players_alone_are_learned_from(recording, tmp_path):
    both = tiny_recording.write(tmp_path / "both", sources=("expert", "noisy"))
    asked = SimpleNamespace(data=[both, recording], sources=["expert"], successful=False)
    for part in finetune._episodes(asked):
        assert part.num_episodes
        assert {part.sources[number] for number in part.source} == {"expert"}
    asked.sources = ["expert", "nobody"]
    with pytest.raises(DataError, match="--sources: the recordings have .* got .'nobody'"):
        finetune._episodes(asked)


def test_existing_folder_and_recording_without_success_are_refused(start, recording, tmp_path):
    with pytest.raises(DataError, match="exists"):
        train_policy.main(_command(start, recording, start))
    with pytest.raises(DataError, match="0 training and 0 held-out episodes"):
        train_policy.main(_command(start, recording, tmp_path / "out", "--successful"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_rank", "2"], "needs --start"),
        (["--data", "y", "--unnorm_key", "z"], "needs either --start"),
        (["--start", "x", "--sizes", "miniature", "--data", "y"], "needs either --start"),
        (["--sizes", "miniature"], "sizes: not without --data"),
        (["--start", "x", "--lora_alpha", "2"], "--lora_rank must be"),
        (["--start", "x", "--data", "y"], "needs --unnorm_key"),
        (["--start", "x", "--data", "y", "--unnorm_key", "z", "--labels", "sloppy"], "labels: not"),
        (["--gripper", "none"], "gripper: not without --data"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_policy.main(["--out", "o", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_new_policy_has_the_named_sizes_and_resumes_from_its_own_random_weights(
    start, recording, tmp_path, monkeypatch
):
    sizes, save = str(start / "config.json"), finetune.save_progress

    def command(out):
        return [*_command(start, recording, tmp_path / out), "--sizes", sizes][2:]

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_progress", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_policy.main(command("broken"))
    train_policy.main(command("broken"))
    train_policy.main(command("whole"))
    broken, whole, base = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "broken", tmp_path / "whole", start)
    )
    assert {n: v.shape for n, v in whole.items()} == {n: v.shape for n, v in base.items()}
    assert all(np.array_equal(broken[name], whole[name]) for name in whole)
    assert set(read_norm_stats(tmp_path / "whole")) == {"robot"}
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    assert card["start"] == {}
    assert card["chunk"] == 2


def test_goals_are_where_things_are_and_every_step_can_be_one_of_decision(recording):
    data = recordings.load(recording)
    data.objects[:, 0] = data.poses[:, :3] + [0.1, 0, 0]
    chunks = policy_data.Chunks(data, 3, {"action": IDENTITY}, "none", every_step=True)
    assert len(chunks) == data.length.sum()
    assert chunks.knows_goals
    batch = chunks.read(np.arange(len(chunks)))
    assert np.isnan(batch.goals[:, 3:6]).all()
    np.testing.assert_allclose(batch.goals[:, :3], batch.goals[:, 6:], atol=1e-5)
    np.testing.assert_allclose(batch.goals[:, 6:].mean(0), 0, atol=1e-4)
    moved = np.diff(batch.goals[:3, 6:], axis=0)  # an episode of three actions comes first
    np.testing.assert_allclose(moved, 10 * np.diff(data.poses[:3, :3], axis=0), atol=1e-4)


def test_goals_that_nobody_tells_are_refused(start, recording, tmp_path):
    with pytest.raises(DataError, match="no recording tells where things are"):
        train_policy.main(_command(start, recording, tmp_path / "out", "--goal_weight", "1"))


def test_weights_that_are_not_finite_are_neither_saved_nor_written(start, recording, tmp_path):
    command = _command(start, recording, tmp_path / "out", *RANK, "--lr", "1e38", "--steps", "5")
    with pytest.raises(TrainingError, match=r"step \d: the .* is (nan|inf).*lower --lr \(1e\+38\)"):
        train_policy.main(command)
    assert not list(tmp_path.iterdir())
