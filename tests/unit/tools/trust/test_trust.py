import base64
import dataclasses
import hashlib
import io
import json
import re

import markupsafe
import numpy as np
import pytest
from PIL import Image

from benchmarks import vlm_reward
from evac_jax.config.vlm import VlmConfig
from evac_jax.config.vlm_card import VlmCard
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.files import cards, recordings
from evac_jax.miniature import scene
from evac_jax.miniature.render import render
from evac_jax.tools.trust import __main__ as trust
from evac_jax.tools.trust import page

MARKUP = '<script src="http://x">'  # a name in a recording


def test_episodes_are_drawn_per_source_when_there_are_too_many(recording):
    chosen = trust.choose(recording, "all", 1, seed=0)
    assert sorted(chosen.source.tolist()) == [0, 1]


def test_preset_plays_its_ground_truth_when_there_is_no_recording(weights):
    config = trust.preset_config("miniature")
    policy = dataclasses.replace(config.policy, checkpoint=str(weights / "policy"))
    config = dataclasses.replace(config, policy=policy)

    data = trust.record(config, None, 2, seed=5)

    assert data.sources == ("expert", "noisy", "start policy")
    assert data.source.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(data.start)) == 6
    assert data.length.tolist() == [32] * 6
    scenes = scene.sample_scenes(data.start)
    np.testing.assert_array_equal(data.frames[data.first, 0], render(scenes))


def test_recording_is_refused_when_nothing_is_held_out(recording):
    nothing = recording.select(np.zeros(0, np.int64))
    with pytest.raises(DataError, match="--part=all"):
        trust.choose(nothing, "held_out", 0, seed=0)


def test_last_line_says_nan_when_a_figure_does_not_exist():
    line = trust.last_line(
        {"agreement": 0.875, "false_success": None, "psnr_1": 26.44, "psnr_4": 20.0}
    )
    assert line == "agreement=0.88 false_success=nan psnr_1=26.4 psnr_4=20.0"


def test_report_is_written_when_a_recording_is_given(weights, recording, tmp_path, capsys):
    folder = tmp_path / "recording"
    flags = {
        "data": _saved(recording, folder),
        "part": "all",
        "out": tmp_path / "report",
        "steps": 1,
        "threshold": 0.5,
        "judged_frames": 2,
        "eta": 0.0,
        "batch": 3,
        "pictures": 0.6,
        "device": "cpu",
    } | {name: weights / name for name in ("world_model", "reward", "pose_model")}

    (tmp_path / "report").mkdir()
    for name in ("report.json", "report.html"):
        (tmp_path / "report" / name).write_text("an earlier one")

    trust.main([f"--{name}={value}" for name, value in flags.items()])

    for name in ("report_1.json", "report_1.html"):
        assert (tmp_path / "report" / name).read_text() == "an earlier one"
    last = capsys.readouterr().out.splitlines()[-1]
    number = r"(\d\.\d\d|nan)"
    assert re.fullmatch(
        rf"agreement={number} false_success={number} psnr_1=\d+\.\d psnr_4=\d+\.\d", last
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["weights"] == {
        name: {"model.safetensors": cards.sha256(weights / name / "model.safetensors")}
        for name in ("world_model", "pose_model", "reward")
    }
    assert report["overall"]["episodes"] == 4
    assert report["overall"]["pictures"] == 3  # two of a batch of three, and the fourth episode
    assert set(report["kinds"]) == {"expert", MARKUP}
    assert len(report["drift"]["psnr"]) == 32
    assert len(report["overall"]["per_chunk"]["block_px"]) == 4
    text = (tmp_path / "report" / "report.html").read_text()
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded]
    assert pictures
    assert all(picture.width >= 9 * 64 for picture in pictures)
    assert text.count("<svg") == 6  # success, verdicts, four errors over time
    assert 'src="http' not in text
    assert MARKUP not in text
    assert markupsafe.escape(MARKUP) in text


@pytest.mark.slow
def test_vision_language_model_judges_beside_a_classifier(weights, recording, tmp_path):
    model = vlm_reward.write_tiny(tmp_path / "model")
    (tmp_path / "vlm").mkdir()
    vlm = VlmConfig(average=2, dtype="float32")
    VlmCard.make(model, -80.0, 8, vlm).write(tmp_path / "vlm")  # everything is a success to it
    common = {"data": _saved(recording, tmp_path / "recording"), "part": "all", "steps": 1}
    common |= {"eta": 0.0, "batch": 3, "device": "cpu", "pictures": 1.0}
    common |= {name: weights / name for name in ("world_model", "pose_model")}
    found = []
    for out, rewards in (
        ("one", {"reward": tmp_path / "vlm", "second_reward": weights / "reward"}),
        ("other", {"reward": weights / "reward", "threshold": 0.5}),
    ):
        flags = common | rewards | {"out": tmp_path / out}
        trust.main([f"--{name}={value}" for name, value in flags.items()])
        found.append(json.loads((tmp_path / out / "report.json").read_text()))
    one, other = found
    assert one["overall"]["imagined_success"]["hits"] == 4
    assert one["settings"]["threshold"] == -80.0
    assert one["second_reward"]["name"] == "reward"
    shares = one["second_reward"]["overall"]
    assert shares == {name: other["overall"][name] for name in shares}
    assert one["overall"]["per_chunk"] == other["overall"]["per_chunk"]  # the same frames
    assert "all, judged by reward" in (tmp_path / "one" / "report.html").read_text()


def test_weights_are_told_apart_when_their_folders_have_one_name(tmp_path):
    for parent, text in (("a", "one"), ("b", "other")):
        folder = tmp_path / parent / "reward"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(text)
    (folder / "config.json").write_text('{"weights": "public.pt"}')
    (folder / "public.pt").write_text("public")
    both = f"{tmp_path}/a/reward,{tmp_path}/b/reward"
    folders = trust.weights_of({"reward": both, "world_model": str(folder), "pose_model": ""})
    assert {name: list(trust.digests(path)) for name, path in folders.items()} == {
        "reward": ["model.safetensors"],
        "reward[1]": ["public.pt"],  # that alone is read
        "world_model": ["public.pt"],
    }
    assert trust.digests(folder)["public.pt"] == hashlib.sha256(b"public").hexdigest()
    assert trust.digests(tmp_path / "judged by code of one's own") == {}


def test_threshold_of_a_flag_is_not_the_second_rewards():
    args = trust.parse(["--data=x", "--reward=a", "--threshold=0.8", "--second_reward=b"])
    assert trust.settings_of(args, None)["threshold"] == 0.8
    assert "threshold" not in trust.settings_of(trust.second(args), None)
    assert trust.settings_of(trust.second(args), None)["reward"] == "b"


def _saved(data, folder):
    """Write loaded episodes again."""
    writer = recordings.EpisodeWriter(
        folder,
        image_shape=data.frames.shape[1:],
        instructions=data.instructions,
        sources=("expert", MARKUP),
        intrinsic=data.intrinsic,
        c2w=data.c2w,
        facts={},
    )
    with writer:
        for n in range(data.num_episodes):
            rows = data.rows(np.array(n), np.arange(data.length[n] + 1))
            writer.add(
                frames=data.frames[rows],
                actions=data.actions[rows[:-1]],
                poses=data.poses[rows],
                success=data.success[rows],
                task=int(data.task[n]),
                source=int(data.source[n]),
            )
    return folder


def test_folder_of_other_files_gets_no_report(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(DataError, match="exists and holds nothing to go on with .no report.json"):
        trust.main(["--data=nowhere", f"--out={tmp_path}"])
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--pictures=0", "--threshold=nan", "--steps=0", "--episodes=-1"])
def test_numbers_out_of_range_are_refused(flag):
    with pytest.raises(SystemExit):
        trust.parse(["--data=x", flag])


@pytest.mark.parametrize(
    ("flag", "folder", "error", "message"),
    [
        ("second_reward", "mistyped", ConfigError, "reward: '.*mistyped' does not exist"),
        ("second_reward", "world_model", CheckpointError, "expected a model of kind RewardNet"),
        ("reward", "world_model", CheckpointError, "expected a model of kind RewardNet"),
        ("pose_model", "mistyped", ConfigError, "pose_model: '.*mistyped' does not exist"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_judge_that_cannot_be_loaded_is_refused_before_anything_is_played(
    weights, recording, tmp_path, monkeypatch, flag, folder, error, message, given
):
    for name in ("record", "validate"):
        monkeypatch.setattr(trust, name, lambda *_, **__: pytest.fail("played"))
    flags = {name: weights / name for name in ("world_model", "reward", "pose_model")}
    flags |= {flag: weights / folder, "out": tmp_path / "report", "device": "cpu"}
    if given:
        flags |= {"data": _saved(recording, tmp_path / "recording"), "part": "all"}
    else:
        flags |= {"preset": "miniature"}
    with pytest.raises(error, match=message):
        trust.main([f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.parametrize("fails", ["second", "page"])
def test_figures_are_saved_before_more_is_imagined_and_drawn(
    weights, recording, tmp_path, monkeypatch, fails
):
    def fail(*_):
        raise ValueError("a test")

    def validate(data, settings, **_):
        if fails == "second" and settings["reward"] == str(weights / "second"):
            fail()
        return {"notes": [], "overall": {"episodes": 4, **dict.fromkeys(page.SHARES)}} | {
            "settings": {}
        }, []

    monkeypatch.setattr(trust, "validate", validate)
    monkeypatch.setattr(trust, "check_judge", lambda *_: None)
    monkeypatch.setattr(page, "write", fail)
    flags = {name: weights / name for name in ("world_model", "reward", "pose_model")}
    flags |= {"second_reward": weights / "second", "out": tmp_path / "report", "device": "cpu"}
    flags |= {"data": _saved(recording, tmp_path / "recording"), "part": "all"}
    with pytest.raises(ValueError, match="a test"):
        trust.main([f"--{name}={value}" for name, value in flags.items()])
    (report,) = (tmp_path / "report").iterdir()
    assert report.name == "report.json"
    assert ("second_reward" in json.loads(report.read_text())) == (fails == "page")
