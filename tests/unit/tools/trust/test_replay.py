from types import SimpleNamespace

import numpy as np
import torch

from evac_jax.miniature.render import BLOCK_COLORS
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.tools.trust.replay import FALSE, RIGHT, make_environment, replay


def _settings(weights, **more) -> dict:
    folders = {name: str(weights / name) for name in ("world_model", "reward", "pose_model")}
    return {**folders, "steps": 1, "threshold": 0.5, "judged_frames": 2, **more}


def _replayed(weights, recording, batch=4, **more):
    source = RecordedStarts(recording)
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


def test_everything_agrees_when_the_truth_is_imagined(weights, recording):
    source = RecordedStarts(recording)
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
                           RecordedStarts(data), 32, 1, 1)  # fmt: skip
    pushed = []
    env._advance = lambda action, pose, _: pushed.append(action[0].numpy().copy()) or pose

    replay(env, data)

    rows = data.rows(np.array(0), np.arange(32))
    assert set(data.actions[rows, 6]) == {-1, 1}
    np.testing.assert_array_equal(np.stack(pushed), data.actions[rows])
