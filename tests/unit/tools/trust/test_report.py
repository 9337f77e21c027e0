import base64
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evac_jax.errors import ConfigError, DataError
from evac_jax.files import recordings
from evac_jax.miniature import scene
from evac_jax.miniature.expert import Expert, demonstrate
from evac_jax.miniature.render import BLOCK_COLORS, FINGER_HALF, PALM_HALF, camera, project, render
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.tools.trust import __main__ as trust
from evac_jax.tools.trust import charts, page, scores
from evac_jax.tools.trust.replay import FALSE, MISSED, RIGHT, Film, make_environment, replay
from tests.integration import tiny_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_weights.write(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two expert and two noisy episodes; one of each kind is shorter than four chunks."""
    out = tmp_path_factory.mktemp("data") / "recording"
    intrinsic, c2w = camera(64)
    writer = recordings.EpisodeWriter(
        out,
        image_shape=(1, 64, 64, 3),
        instructions=INSTRUCTIONS,
        sources=["expert", "noisy"],
        intrinsic=intrinsic[None],
        c2w=c2w[None],
        facts={"command": "a test", "versions": {}},
    )
    with writer:
        for seed in range(4):
            source, steps = seed % 2, 32 if seed < 2 else 12
            player = Expert(("expert", "noisy")[source], np.random.default_rng(seed))
            scenes = scene.sample_scenes(np.array([seed]))
            actions, states = demonstrate(scenes, player, steps)
            writer.add(
                frames=np.stack([render(state) for state in states]),
                actions=actions[0],
                poses=np.concatenate([state.pose for state in states]),
                success=np.concatenate([scene.is_success(state) for state in states]),
                task=int(scenes.task[0]),
                source=source,
                start=seed,
            )
    return recordings.load(out)


def _settings(weights, **more) -> dict:
    folders = {name: str(weights / name) for name in ("world_model", "reward", "pose_model")}
    return {**folders, "steps": 1, "threshold": 0.5, "judged_frames": 2, **more}


def _replayed(weights, recording, batch=4, **more):
    source = RecordedStarts(recording, INSTRUCTIONS)
    env = make_environment(_settings(weights, **more), source, 32, batch, batch)
    return replay(env, recording, colors=BLOCK_COLORS)


def _imagine_the_truth(env, data):
    """Replace what `env` imagines by the recording itself."""
    steps, now, starts = np.arange(33), 0, None

    def reset(ids, seed, frames, clip):
        nonlocal now, starts
        now, starts = 0, np.maximum(ids, 0)
        frames.copy_(torch.from_numpy(data.frames[data.first[starts]]))

    def step(actions, frames, clip):
        nonlocal now
        chunk, length = clip.shape[1], data.length[starts][:, None]
        rows = data.rows(starts[:, None], np.minimum(now + 1 + np.arange(chunk), length))
        clip.copy_(torch.from_numpy(data.frames[rows[: len(clip)]]))
        env.window.poses[:, -chunk:] = torch.from_numpy(data.poses[rows])
        now += chunk
        seen = data.success[data.rows(starts[:, None], np.minimum(steps, length))]
        return SimpleNamespace(success=(seen & (steps <= now)).any(1))

    env.reset, env.step = reset, step


# --- scores ---------------------------------------------------------------------------------


def test_similarity_is_one_for_equal_pictures_and_falls_with_noise():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 24, 30, 3), dtype=np.uint8)
    noisy = np.clip(picture + rng.normal(0, 40, picture.shape), 0, 255).astype(np.uint8)

    assert scores.ssim(picture, picture)[0] == pytest.approx(1, abs=1e-4)
    assert scores.ssim(picture, noisy)[0] < 0.95


def test_similarity_is_that_of_the_formula_when_pictures_are_flat():
    # Without variance only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    one, other = (np.full((16, 16, 3), value, np.uint8) for value in (100, 150))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert scores.ssim(one, other) == pytest.approx(expected, abs=1e-3)


def test_blocks_are_found_where_the_camera_sees_them():
    scenes = scene.sample_scenes(np.arange(40))
    found = scores.locate(render(scenes), BLOCK_COLORS)
    rows = np.arange(40)
    for block in (0, 1):
        seen = found[rows, scenes.colors[:, block]]
        true = project(scenes.blocks[:, block], 64) - 0.5  # pixel centres lie at + 0.5
        away = np.linalg.norm(seen - true, axis=-1)
        hidden = np.isnan(away)
        assert hidden.mean() < 0.1  # behind the gripper
        assert np.nanmedian(away) < 1.0
    gone = dataclasses.replace(scenes, blocks=scenes.blocks + (9, 0, 0))
    assert np.isnan(scores.locate(render(gone), BLOCK_COLORS)[:, :2]).all()
    palm = scenes.position + (0, 0, 2 * FINGER_HALF[2] + PALM_HALF[2])
    assert np.linalg.norm(found[:, -1] - project(palm, 64) + 0.5, axis=-1).max() < 1.5


def test_lost_block_counts_when_only_the_truth_shows_it():
    real = render(scene.sample_scenes(np.array([3])))[None]  # [1 1 64 64 3]
    records = scores.Records.empty(1, 1, 3)
    grey = np.full_like(real, 128)
    scores.compare(records, (np.array([0]), np.array([0])), grey, real, BLOCK_COLORS)

    lost = records.thing_lost[0, 0]
    assert sorted(lost[~np.isnan(lost)]) == [1, 1, 1]  # two blocks, the gripper
    assert np.isnan(records.thing_px[0, 0]).all()


def test_verdicts_have_their_own_denominators_when_counted():
    imagined = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    real = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)

    shares = scores.verdicts(imagined, real)

    assert {name: (s["hits"], s["of"]) for name, s in shares.items()} == {
        "imagined_success": (3, 10),
        "real_success": (3, 10),
        "agreement": (6, 10),
        "false_success": (2, 3),
        "missed_success": (2, 3),
    }
    low, high = shares["agreement"]["interval_95"]
    assert low < 0.6 < high


def test_false_share_has_no_rate_when_nothing_succeeded():
    none = np.zeros(4, bool)
    assert scores.verdicts(none, none)["false_success"]["rate"] is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0.1, 0.2, 0.9], [10, 20, 30], 1.0),
        ([0.1, 0.2, 0.9], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833),  # ties share rank 2.5
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation_is_known_when_worked_by_hand(one, other, expected):
    assert scores.spearman(one, other) == pytest.approx(expected)


def test_chunks_are_pooled_when_episodes_differ_in_length():
    records = scores.Records.empty(2, 4, 0)
    records.mse[0] = (255**2 / 100, 255**2 / 100, 255**2 / 10, 255**2 / 10)  # 20 and 10 dB
    records.mse[1, :2] = 255**2 / 100
    curves = scores.curves(records, np.ones(2, bool), 2)
    assert curves["psnr"] == pytest.approx([20, 10])


# --- replay ---------------------------------------------------------------------------------


def test_everything_agrees_when_the_truth_is_imagined(weights, recording):
    source = RecordedStarts(recording, INSTRUCTIONS)
    env = make_environment(_settings(weights), source, 32, 3, 2)
    _imagine_the_truth(env, recording)

    records, films = replay(env, recording, colors=BLOCK_COLORS)

    assert recording.success_once().any()
    assert not recording.success_once().all()
    np.testing.assert_array_equal(records.imagined, recording.success_once())
    unseen = np.argsort(recording.length, kind="stable")[2]  # two of three are filmed
    for episode, length in enumerate(recording.length):
        for name, until in (("pose_mm", length), ("mse", 0 if episode == unseen else length)):
            values = getattr(records, name)[episode]
            assert (values[:until] == 0).all()
            assert np.isnan(values[until:]).all()
        assert (np.nan_to_num(records.thing_px[episode]) == 0).all()
    for film in films:
        np.testing.assert_array_equal(film.imagined, film.real)


def test_batches_change_nothing_but_the_noise_when_episodes_are_many(weights, recording):
    short = recording.select(recording.length == 12)
    whole, _ = _replayed(weights, short, batch=2)
    halves, _ = _replayed(weights, short, batch=1)

    np.testing.assert_allclose(whole.pose_mm, halves.pose_mm, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(np.isnan(whole.mse), np.isnan(halves.mse))
    assert np.isfinite(whole.mse).all()


def test_verdict_ends_with_the_recording_when_imagination_goes_on(weights, recording):
    # Everything counts as success: the first chunk already decides.
    records, films = _replayed(weights, recording, threshold=1e-9)
    assert records.imagined.all()
    assert {film.verdict for film in films} == {RIGHT, FALSE}


def test_recorded_gripper_is_not_translated_when_played_again(weights, recording):
    data = recording.select(np.array([0]))
    env = make_environment(_settings(weights, gripper="libero"),
                           RecordedStarts(data, INSTRUCTIONS), 32, 1, 1)  # fmt: skip
    pushed = []
    env._advance = lambda action, pose: pushed.append(action[0].numpy().copy()) or pose

    replay(env, data)

    rows = data.rows(np.array(0), np.arange(32))
    assert set(data.actions[rows, 6]) == {-1, 1}
    np.testing.assert_array_equal(np.stack(pushed), data.actions[rows])


def test_instruction_is_refused_when_the_classifier_does_not_know_it(recording):
    with pytest.raises(ConfigError, match="also has"):
        RecordedStarts(recording, ["fold the towel"])


def test_instructions_are_matched_by_text_when_their_order_differs(recording):
    source = RecordedStarts(recording, INSTRUCTIONS[::-1])
    task = source.load(np.arange(4)).task
    assert [INSTRUCTIONS[::-1][t] for t in task] == [INSTRUCTIONS[t] for t in recording.task]


# --- choice of episodes, words and files -----------------------------------------------------


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


def _overall(agreement: tuple[int, int], false: tuple[int, int]) -> dict:
    return {
        "agreement": scores.share(*agreement),
        "false_success": scores.share(*false),
    }


@pytest.mark.parametrize(
    ("agreement", "false", "expected"),
    [
        ((500, 512), (5, 200), "good"),
        ((450, 512), (25, 200), "unsure"),
        ((500, 512), (40, 200), "bad"),
        ((400, 512), (5, 200), "bad"),
        ((500, 512), (0, 0), "bad"),
    ],
)
def test_words_follow_the_figures_when_they_are_judged(agreement, false, expected):
    assert page.judge(_overall(agreement, false))[0] == expected


def test_last_line_says_nan_when_a_figure_does_not_exist():
    line = trust.last_line(
        {"agreement": 0.875, "false_success": None, "psnr_1": 26.44, "psnr_4": 20.0}
    )
    assert line == "agreement=0.88 false_success=nan psnr_1=26.4 psnr_4=20.0"


def test_film_strips_show_each_verdict_when_there_is_one():
    frames = np.zeros((9, 1, 64, 64, 3), np.uint8)
    films = [Film(verdict, "expert", frames, frames) for verdict in (MISSED, FALSE, RIGHT, RIGHT)]
    titles = [title.split(":")[0] for title, _ in charts.strips([*films, films[-1]])]
    assert titles == ["right", "right", "false", "missed"]


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

    trust.main([f"--{name}={value}" for name, value in flags.items()])

    last = capsys.readouterr().out.splitlines()[-1]
    number = r"(\d\.\d\d|nan)"
    assert re.fullmatch(
        rf"agreement={number} false_success={number} psnr_1=\d+\.\d psnr_4=\d+\.\d", last
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["overall"]["episodes"] == 4
    assert report["overall"]["pictures"] == 3  # two of a batch of three, and the fourth episode
    assert set(report["kinds"]) == {"expert", "noisy"}
    assert len(report["drift"]["psnr"]) == 32
    assert len(report["overall"]["per_chunk"]["block_px"]) == 4
    text = (tmp_path / "report" / "report.html").read_text()
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pictures = [tmp_path / "report" / name for name in ("report.png", "films.png")]
    assert [base64.b64decode(data) for data in encoded] == [p.read_bytes() for p in pictures]
    assert 'src="http' not in text
    assert all(Image.open(picture).width >= 1000 for picture in pictures)


def _saved(data, folder):
    """Write loaded episodes again."""
    writer = recordings.EpisodeWriter(
        folder,
        image_shape=data.frames.shape[1:],
        instructions=data.instructions,
        sources=data.sources,
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
