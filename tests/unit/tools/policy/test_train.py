import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from evac_jax.errors import CheckpointError, DataError, TrainingError
from evac_jax.miniature import scene
from evac_jax.miniature.render import project
from evac_jax.tools.policy import train as train_policy
from policies.openvla_oft.action_tokens import ActionStatistics, bin_centres
from policies.openvla_oft.model import OpenVLAOFT

SIZE, PATCH = train_policy.POLICY.image_size, train_policy.POLICY.patch_size
STATISTICS = ActionStatistics.from_norm_stats(train_policy.NORM_STATS, train_policy.UNNORM_KEY)


def test_objects_are_told_to_the_patch_that_shows_them():
    scenes = scene.sample_scenes(np.arange(20))
    patch, points = train_policy.object_targets(scenes)
    for n in range(20):
        target = scenes.colors[n, scene.TARGET]
        column, row = np.floor(project(scenes.blocks[n, scene.TARGET], SIZE) / PATCH)
        assert patch[n, target] == row * (SIZE // PATCH) + column
        np.testing.assert_allclose(points[n, target], 10 * scenes.blocks[n, scene.TARGET])
        np.testing.assert_allclose(points[n, -1], 10 * scenes.position[n])
    scenes.blocks[0, scene.TARGET, 0] = 9.0  # far outside of the picture
    patch, points = train_policy.object_targets(scenes)
    assert patch[0, scenes.colors[0, scene.TARGET]] == -1
    assert not points[0, scenes.colors[0, scene.TARGET]].any()


def test_goals_name_target_plate_and_tip_in_units_of_10_cm():
    scenes = scene.sample_scenes(np.arange(3))
    goals = train_policy.goals_of(scenes)
    np.testing.assert_allclose(goals[:, :3], 10 * scenes.blocks[:, scene.TARGET], rtol=1e-6)
    np.testing.assert_allclose(goals[:, 3:5], 10 * scenes.plate, rtol=1e-6)
    np.testing.assert_allclose(goals[:, 5:], 10 * scenes.position, rtol=1e-6)


def test_soft_targets_are_centred_on_the_action_and_as_wide_as_asked():
    action = jnp.array([0.3, -0.2, 0.0, 0.0, 0.0, 0.0, 0.5])[None, None]
    targets = np.asarray(train_policy.soft_targets(action, STATISTICS, 6.0))[0, 0]
    centres = bin_centres(256)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
    mean = targets @ centres
    np.testing.assert_allclose(mean[:2], (0.3, -0.2), atol=2e-3)
    spread = np.sqrt(targets[0] @ (centres - mean[0]) ** 2)
    assert spread == pytest.approx(6 * 2 / 255, rel=0.02)


def test_batches_of_different_seeds_share_no_scene():
    one = train_policy.samples("expert", 4, 0, chunk=8)
    other = train_policy.samples("expert", 4, 1, chunk=8)
    assert one[0].shape == (16, SIZE, SIZE, 3)
    assert one[2].shape == (16, 8, 7)
    starts = {tuple(goal[:5]) for goal in one[3]} & {tuple(goal[:5]) for goal in other[3]}
    assert not starts


@pytest.fixture
def config(monkeypatch):
    """A smaller policy than the tabletop's."""
    config = dataclasses.replace(
        train_policy.POLICY,
        dinov2=dataclasses.replace(train_policy.POLICY.dinov2, width=32, mlp_width=64),
        siglip=dataclasses.replace(train_policy.POLICY.siglip, width=32, mlp_width=64),
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
    )
    monkeypatch.setattr(train_policy, "POLICY", config)
    return config


def test_resumed_run_draws_the_batches_of_an_unbroken_one(monkeypatch):
    monkeypatch.setattr(
        train_policy, "samples", lambda labels, n, seed, chunk: [1000 * seed + np.arange(4 * n)]
    )
    args = SimpleNamespace(seed=0, labels="expert", batch=4)
    unbroken = [part.tolist() for (part,) in itertools.islice(train_policy._batches(args, 0), 40)]
    assert len({number for part in unbroken for number in part}) == 40 * 4
    for first in (5, 16, 33):
        resumed = itertools.islice(train_policy._batches(args, first), 40 - first)
        assert [part.tolist() for (part,) in resumed] == unbroken[first:]


@pytest.mark.slow
def test_tabletop_run_is_saved_before_it_is_scored_and_repeats_an_unbroken_one(
    config, tmp_path, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    command = ["--steps", "2", "--score_every", "1", "--batch", "2", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(train_policy, "play", stop)
        with pytest.raises(KeyboardInterrupt):
            train_policy.main([*command, str(tmp_path / "broken")])
    (progress,) = tmp_path.iterdir()
    with safe_open(progress, "numpy") as file:
        assert json.loads(file.metadata()["facts"]) == {"step": 1, "history": []}
    monkeypatch.setattr(train_policy, "play", lambda *_, greedy: float(greedy))
    for name in ("broken", "unbroken"):
        train_policy.main([*command, str(tmp_path / name)])
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "unbroken"}
    card = json.loads((tmp_path / "broken" / "card.json").read_text())
    assert card["history"] == [{"step": n, "greedy": 1.0, "sampled": 0.0} for n in (1, 2)]
    broken, unbroken = (
        load_file(tmp_path / name / "model.safetensors") for name in ("broken", "unbroken")
    )
    for name, weights in unbroken.items():
        np.testing.assert_array_equal(broken[name], weights)


@pytest.mark.slow
def test_pretraining_teaches_patches_what_they_show(config, monkeypatch):
    lines = []
    monkeypatch.setattr(train_policy.logging, "info", lambda text, *a: lines.append(a))
    model = OpenVLAOFT(config, STATISTICS, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.arange(3)[:, None] + 5 + np.arange(config.max_prompt_length))
    prompts = tokens, jnp.ones_like(tokens, bool)
    train_policy.pretrain(model, prompts, steps=200, batch=4, lr=3e-3, seed=0)
    (_, _, first, _), (_, _, last, _) = lines  # centimetres
    assert last < 0.9 * first


def test_existing_folder_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError, match=f"--out: {tmp_path} exists"):
        train_policy.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    "flag", ["--lr=nan", "--lr=0", "--steps=0", "--batch=0", "--pretrain_steps=-1", "--labels=me"]
)
def test_numbers_that_cannot_train_are_refused_by_name(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        train_policy.main(["--out", str(tmp_path / "out"), flag])
    assert ended.value.code == 2
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err


def test_start_that_is_no_policy_is_refused_by_its_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "EvacModel", "config": {}}')
    for folder, why in (("nowhere", "not a Hugging Face policy folder"), (tmp_path, "OpenVLA")):
        with pytest.raises(CheckpointError, match=f"--start: cannot import '{folder}': .*{why}"):
            train_policy.main(
                ["--start", str(folder), "--out", str(tmp_path / "out"), "--data", "nothing"]
                + ["--unnorm_key", "robot"]
            )


def test_losses_and_weights_that_are_not_finite_end_a_training():
    good, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
    train_policy.check_trained(2, [good, good], {"w": good, "none": jnp.ones(0)}, "")
    with pytest.raises(TrainingError, match="step 4: the loss is nan. Lower it"):
        train_policy.check_trained(5, [good, bad, good], {"w": good}, "Lower it")
    with pytest.raises(TrainingError, match="step 5: the largest weight is nan"):
        train_policy.check_trained(5, [good], {"v": good, "w": bad}, "")


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_few_steps_of_pretraining_have_a_schedule(monkeypatch, steps):
    schedules = []
    schedule = train_policy.optax.warmup_cosine_decay_schedule

    def stop(*args):
        schedules.append(schedule(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_policy.optax, "warmup_cosine_decay_schedule", stop)
    model = OpenVLAOFT(train_policy.POLICY, STATISTICS, rngs=nnx.Rngs(0))
    with pytest.raises(KeyboardInterrupt):
        train_policy.pretrain(model, (), steps=steps, batch=1, lr=1e-3, seed=0)
    assert len(schedules) == 1
