import json

import numpy as np
import pytest
import torch

from benchmarks import vlm_reward
from evac_jax.config import vlm_card
from evac_jax.config.vlm import VlmConfig
from evac_jax.errors import ConfigError, DataError, TrainingError
from evac_jax.files import recordings
from evac_jax.sim.vlm import VlmJudge
from evac_jax.tools.reward import vlm_threshold

CHUNK = 4


def write(folder, count=24, lengths=(8, 6), success_from=5):
    """Even episodes succeed from one frame on; grey levels tell the step."""
    with recordings.EpisodeWriter(
        folder,
        image_shape=(1, 32, 32, 3),
        instructions=vlm_reward.TASKS,
        sources=["test"],
        intrinsic=np.eye(3)[None],
        c2w=np.eye(4)[None],
        facts={},
    ) as writer:
        for n in range(count):
            length = lengths[n % 3 == 2]
            grey = np.arange(length + 1, dtype=np.uint8).reshape(-1, 1, 1, 1, 1)
            poses = np.zeros((length + 1, 8), np.float32)
            poses[:, 6] = 1
            writer.add(
                frames=np.broadcast_to(grey, (length + 1, 1, 32, 32, 3)),
                actions=np.zeros((length, 7), np.float32),
                poses=poses,
                success=(np.arange(length + 1) >= success_from) & (n % 2 == 0),
                task=n % 2,
                source=0,
                held_out=n >= count - 8,
            )
    return str(folder)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "real")


class Reading:
    """A judge that says minus the latest frame's grey level, and minus a hundred for task 1."""

    config, instructions, watch = VlmConfig(average=1), (), VlmJudge.watch

    def log_probability(self, episodes, instructions):
        latest = [float(frames[-1][0, 0, 0]) for frames in episodes]
        other = [100.0 * (text == vlm_reward.TASKS[1]) for text in instructions]
        return -torch.tensor(latest) - torch.tensor(other)


def test_recordings_are_judged_at_the_ends_of_chunks_and_of_episodes(recording):
    data = recordings.load(recording)
    values = vlm_threshold.verdicts(Reading(), data, CHUNK)
    assert values.shape == (24, 9)
    nothing = -np.inf
    assert values[0].tolist() == [nothing] * 4 + [-4] + [nothing] * 3 + [-8]
    assert values[1].tolist() == [nothing] * 4 + [-104] + [nothing] * 3 + [-108]
    # The third one is 6 actions long.
    assert values[2].tolist() == [nothing] * 4 + [-4, nothing, -6, nothing, nothing]


def test_threshold_lies_between_episodes_and_keeps_to_the_share_of_false_claims():
    nothing = -np.inf
    values = np.array([[nothing, -1.0], [nothing, -2.0], [nothing, -3.0], [nothing, -9.0]])
    success = np.array([[False, True], [False, False], [False, True], [False, False]])
    strict = vlm_threshold.choose(values, success, 0.0)
    assert (strict["threshold"], strict["missed_success"]) == (-1.5, 0.5)
    generous = vlm_threshold.choose(values, success, 0.34)
    assert generous["threshold"] == -6.0
    assert generous["false_success"] == pytest.approx(1 / 3)


def _command(model, out, **flags):
    flags = {"model": model, "out": out, "chunk": CHUNK, "average": 1} | flags
    flags |= {"dtype": "float32", "device": "cpu"}
    vlm_threshold.main([f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.parametrize(
    ("recorded", "average", "error", "message"),
    [
        ({}, 1, KeyboardInterrupt, "loaded"),
        ({"success_from": 99}, 1, DataError, "all 16 episodes are failures"),
        ({"lengths": (4, 3)}, 2, ConfigError, r"1 x 2 chunks of 4 frames, .* has 4; lower one"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, recorded, average, error, message
):
    def load(*_):
        raise KeyboardInterrupt("loaded")

    monkeypatch.setattr(vlm_threshold.VlmJudge, "load", load)
    data = write(tmp_path / "data", **recorded)
    with pytest.raises(error, match=message):
        _command(tmp_path, tmp_path / "out", data=data, average=average)


def test_verdicts_are_kept_where_the_choice_fails(recording, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("a test")

    monkeypatch.setattr(vlm_threshold.VlmJudge, "load", lambda *_: Reading())
    monkeypatch.setattr(vlm_threshold, "choose", fail)
    with pytest.raises(ValueError, match="a test"):
        _command(tmp_path, tmp_path / "out", data=recording)
    kept = np.load(tmp_path / "out.verdicts.npz")
    assert {name: values.shape for name, values in kept.items()} == {
        "chosen_on": (16, 9),
        "real": (8, 9),
    }
    assert not (tmp_path / "out").exists()


def test_recording_without_a_verdict_chooses_nothing():
    success = np.array([[True], [False]])
    with pytest.raises(TrainingError, match="ends before a verdict"):
        vlm_threshold.choose(np.full((2, 1), -np.inf), success, 0.1)


def test_command_writes_what_a_run_takes(recording, tmp_path, capsys):
    model = vlm_reward.write_tiny(tmp_path / "model")
    imagined = write(tmp_path / "imagined", count=20)
    _command(model, tmp_path / "out", data=recording, imagined=imagined, episodes=10)

    assert {path.name for path in tmp_path.iterdir()} == {"model", "imagined", "out"}
    card = vlm_card.read(str(tmp_path / "out"))
    assert (card.average, card.chunk, card.frames) == (1, CHUNK, 8)
    assert vlm_card.simulated(str(tmp_path / "out")) == {"reward": model, "vlm_chunk": CHUNK}
    facts = json.loads((tmp_path / "out" / "card.json").read_text())
    assert facts["chosen_on"]["kind"] == "imagined"
    assert facts["chosen_on"]["episodes"] == 10
    assert facts["held_out_episodes"] == {"real": 8, "imagined": 8}
    said = capsys.readouterr().out
    assert f"--config.reward.threshold={card.threshold} --config.reward.success_frames=1" in said
    assert said.splitlines()[-1].startswith(f"threshold={card.threshold} false_success=")

    data = recordings.load(imagined).split()[1]
    judge = VlmJudge.load(model, (), VlmConfig(average=1, dtype="float32"))
    values = vlm_threshold.verdicts(judge, data, CHUNK)
    claimed = (values >= card.threshold).any(1)
    false = (claimed & ~data.success_once()).sum() / max(claimed.sum(), 1)
    assert facts["scores"]["imagined"]["false_success"] == pytest.approx(false)


@pytest.mark.parametrize(
    "flag", ["--every=0", "--false_success=1", "--false_success=nan", "--dtype=int8"]
)
def test_values_out_of_range_are_refused(flag):
    with pytest.raises(SystemExit):
        vlm_threshold.parse(["--model=a", "--data=b", "--out=c", flag])


def test_prompt_without_a_place_for_the_task_is_refused():
    with pytest.raises(ConfigError, match=r"--prompt: expected \{instruction\} once"):
        vlm_threshold.main(["--model=a", "--data=b", "--out=c", "--prompt=Done? True"])


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "card.json").write_text("mine")
    with pytest.raises(DataError, match=f"--out: {tmp_path} exists; choose another folder"):
        vlm_threshold.main(["--model=a", "--data=b", f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]
    assert (tmp_path / "card.json").read_text() == "mine"
