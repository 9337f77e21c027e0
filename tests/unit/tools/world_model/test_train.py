import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evac_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from evac_jax.evac.schedule import ddim_table
from evac_jax.files import recordings
from evac_jax.miniature.sizes import WORLD_MODEL
from evac_jax.tools import torch_training
from evac_jax.tools.world_model import train as train_world_model
from evac_jax.tools.world_model.options import freeze, make_model, parse
from evac_jax.tools.world_model.validation import BestSoFar, Validation
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording

TRAINED = "model.diffusion_model.out.2.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What every run here starts from; the cache is shared, so frames are encoded once."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_recording.write(folder / "data", lengths=(6, 8, 11))
    tiny_recording.write_model(folder / "model")
    return folder


def _arguments(inputs, out, **options):
    options = {
        "data": inputs / "data",
        "start": inputs / "model",
        "cache": inputs / "cache",
        "out": out,
        "steps": 4,
        "batch": 4,
        "warmup": 1,
        "save_every": 2,
        "log_every": 1,
        "rollouts": 2,
        "rollout_chunks": 2,
        "ddim_steps": 1,
        "validation_windows": 4,
        "device": "cpu",
    } | options
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _train(inputs, out, **options):
    train_world_model.main(_arguments(inputs, out, **options))
    return torch.load(out / "progress.pt", weights_only=True)


def _assert_same(one, other):
    torch.testing.assert_close(one["parameters"], other["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(one["ema"], other["ema"], rtol=0, atol=0)
    assert one["history"] == other["history"]
    assert one["best"] == other["best"]


def _failing_at(step, error):
    """A `Trainer._update` that fails in the given step."""
    update = train_world_model.Trainer._update

    def fail(trainer, lr):
        if trainer.step == step:
            raise error
        return update(trainer, lr)

    return fail


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("optimizer", "owner", "place", "replacement"),
    [
        ("adamw", train_world_model.Trainer, "_update", _failing_at(3, KeyboardInterrupt())),
        ("adamw", Validation, "rollouts", _interrupted),
        ("adamw", train_world_model.TensorBoardWriter, "write", _interrupted),
        pytest.param(
            *("muon", train_world_model.Trainer, "_update", _failing_at(3, KeyboardInterrupt())),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_is_bit_for_bit_the_unbroken_one(
    inputs, tmp_path, monkeypatch, optimizer, owner, place, replacement
):
    common = {"optimizer": optimizer, "log_every": 2}
    unbroken = _train(inputs, tmp_path / "unbroken", **common)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, replacement)
        with pytest.raises(KeyboardInterrupt):
            _train(inputs, tmp_path / "broken", **common)
    saved = torch.load(tmp_path / "broken" / "progress.pt", weights_only=True)
    assert saved["step"] == 2
    resumed = _train(inputs, tmp_path / "broken", **common)
    _assert_same(unbroken, resumed)
    cards = [json.loads((tmp_path / n / "card.json").read_text()) for n in ("unbroken", "broken")]
    assert cards[0]["history"] == cards[1]["history"]
    assert all(len(entry["psnr"]) == 2 for entry in cards[0]["history"])
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("unbroken", "broken")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_resuming_is_refused_when_the_arguments_differ(inputs, tmp_path):
    _train(inputs, tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"lr was 0\.0012 and is 0\.5"):
        _train(inputs, tmp_path, steps=2, lr=0.5)


def _assert_same_gradient(one, other):
    """The first step's, a tenth of which AdamW remembers; weights would show its rounding."""
    gradients = [
        torch.cat([kept["exp_avg"].flatten() for kept in state["optimizers"][0]["state"].values()])
        for state in (one, other)
    ]
    assert gradients[0].norm() > 0.01
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    assert one["history"][0]["loss"] == pytest.approx(other["history"][0]["loss"], rel=1e-5)


def test_accumulation_is_a_bigger_batch(inputs, tmp_path):
    one = _train(inputs, tmp_path / "one", batch=4, steps=1)
    parts = _train(inputs, tmp_path / "parts", batch=1, accumulate=4, steps=1)
    _assert_same_gradient(one, parts)
    smaller = _train(inputs, tmp_path / "smaller", batch=1, steps=1)
    with pytest.raises(AssertionError):
        _assert_same_gradient(one, smaller)


def _timesteps(inputs, out, monkeypatch, **options):
    """Timesteps of every window of a --few_steps run, in order."""
    seen, loss = [], train_world_model.training_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            train_world_model,
            "training_loss",
            lambda *a, timesteps, **k: seen.extend(timesteps.tolist()) or loss(*a, **k),
        )
        train_world_model.main([*_arguments(inputs, out, ddim_steps=3, **options), "--few_steps"])
    return seen


def test_few_step_training_sees_the_timesteps_of_its_sampler_alone(inputs, tmp_path, monkeypatch):
    one = _timesteps(inputs, tmp_path / "one", monkeypatch, steps=8)
    assert set(one) == set(ddim_table(WORLD_MODEL, 3, 0.0).timesteps)
    parts = _timesteps(inputs, tmp_path / "two", monkeypatch, steps=8, batch=2, accumulate=2)
    assert parts == one


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(inputs, tmp_path):
    one = _train(inputs, tmp_path / "one", batch=4, steps=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = _arguments(inputs, tmp_path / "two", batch=2, steps=1)
    command = [sys.executable, "-m", "evac_jax.tools.world_model.train", *arguments]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [subprocess.Popen(command, env={**os.environ, **group, "RANK": rank}) for rank in "01"]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    two = torch.load(tmp_path / "two" / "progress.pt", weights_only=True)
    _assert_same_gradient(one, two)


def test_early_stop_keeps_the_best_weights(inputs, tmp_path, monkeypatch):
    losses = iter((1.0, 0.5, 0.7, 0.6, 0.1))
    averages = []

    def loss(_validation, model, _context):
        averages.append(model.unet.state_dict()["out.2.weight"].clone())
        return next(losses)

    monkeypatch.setattr(Validation, "loss", loss)
    state = _train(inputs, tmp_path, steps=9, save_every=1, patience=2)
    assert [entry["held_out_loss"] for entry in state["history"]] == [1.0, 0.5, 0.7, 0.6]
    kept = load_file(tmp_path / "model.safetensors")[TRAINED]
    assert torch.equal(kept, averages[1])
    assert not torch.equal(kept, averages[3])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["best"] == {"step": 2, "held_out_loss": 0.5}
    again = _train(inputs, tmp_path, steps=9, save_every=1, patience=2)  # it stays stopped
    assert again["step"] == 4


def test_patience_counts_validations_in_a_row():
    best = BestSoFar(patience=2)
    for loss, exhausted in ((3, False), (4, False), (2, False), (2, False), (5, True)):
        best.update(loss, 0)
        assert best.exhausted == exhausted
    never = BestSoFar(patience=0)
    for _ in range(9):
        never.update(1.0, 0)
    assert not never.exhausted


def test_diverged_run_stops_and_keeps_the_last_good_state(inputs, tmp_path, monkeypatch):
    loss = train_world_model.Trainer._loss

    def nan_in_fourth(trainer, *arguments):
        value = loss(trainer, *arguments)
        return value * float("nan") if trainer.step == 3 else value

    with monkeypatch.context() as patch:
        patch.setattr(train_world_model.Trainer, "_loss", nan_in_fourth)
        with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*state of step 2.*--lr"):
            _train(inputs, tmp_path)
    state = torch.load(tmp_path / "progress.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["parameters"].values())
    weights = load_file(tmp_path / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_run_leaves_card_events_and_a_picture(inputs, tmp_path):
    _train(inputs, tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert {"command", "versions", "data", "autoencoder", "start", "sha256"} <= set(card)
    assert card["episodes"]["expert"] > 20
    assert [entry["step"] for entry in card["history"]] == [2, 4]
    assert all(len(entry["psnr"]) == 2 for entry in card["history"])
    with Image.open(tmp_path / "rollouts.png") as picture:
        assert picture.size == (7 * 34 - 2, 2 * (32 + 1 + 32) + 6)  # 7 frames, 2 episodes
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [entry.step for entry in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [entry.step for entry in events.Scalars("eval/psnr_2")] == [2, 4]
    assert [entry.step for entry in events.Images("rollouts")] == [2, 4]


def test_held_out_loss_is_the_same_every_time(inputs, tmp_path):
    one = _train(inputs, tmp_path / "one", steps=2)
    other = _train(inputs, tmp_path / "other", steps=2, seed=1)
    repeated = _train(inputs, tmp_path / "repeated", steps=2)
    values = [state["history"][0]["held_out_loss"] for state in (one, other, repeated)]
    assert values[0] == values[2]
    assert values[0] != values[1]


def test_bfloat16_passes_stay_close_to_float32(inputs, tmp_path):
    losses = [
        _train(inputs, tmp_path / dtype, steps=2, dtype=dtype)["history"][0]["held_out_loss"]
        for dtype in torch_training.DTYPES
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_model_from_scratch_takes_sizes_and_views_from_its_inputs(inputs, tmp_path):
    data = tiny_recording.write(tmp_path / "data", views=2)
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(tiny.TINY.to_dict()))
    arguments = {"data": data, "autoencoder": inputs / "model", "config": sizes, "steps": 1}
    options = _arguments(inputs, tmp_path / "out", **arguments)
    place = options.index("--start")
    del options[place : place + 2]
    train_world_model.main(options)
    made = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert made["n_view"] == 2
    assert made["image_size"] == [32, 32]
    weights = [load_file(f / "model.safetensors") for f in (tmp_path / "out", inputs / "model")]
    frozen = [name for name in weights[0] if name.startswith("first_stage_model.")]
    assert frozen
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in frozen)
    with pytest.raises(DataError, match=r"takes 1 view.*have 2"):
        _train(inputs, tmp_path / "other", data=data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ddim_steps": 1001}, ConfigError, "--ddim_steps: expected 1 to 1000, .*got 1001"),
        ({"weight": "nobody=2"}, ConfigError, r"--weight: no such source \['nobody'\]"),
        ({"weight": "expert=0"}, DataError, "no window to train on"),
        ({"data": "short"}, DataError, "at least 3 actions .one chunk."),
        ({"data": "one"}, DataError, "1 training and 0 held-out episodes; both are needed"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_latents_are_encoded(
    inputs, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.setattr(train_world_model, "cached_latents", lambda *_, **__: pytest.fail("begun"))
    if name := options.get("data"):
        written = {"short": {"lengths": (2,)}, "one": {"count": 1}}[name]
        options = {"data": tiny_recording.write(tmp_path / name, **written)}
    with pytest.raises(error, match=message):
        _train(inputs, tmp_path / "out", **options)


def test_deltas_are_not_fitted_where_all_episodes_are_held_out(inputs):
    data = recordings.load(inputs / "data")
    data = dataclasses.replace(data, held_out=np.ones(data.num_episodes, bool))
    args = parse(["--data=x", f"--autoencoder={inputs / 'model'}", "--out=y", "--fit_deltas"])
    with pytest.raises(DataError, match="0 training and 40 held-out episodes"):
        make_model(args, data)


def test_only_the_named_parts_train():
    model = tiny.tiny_model()
    freeze(model, "unet+image_resampler")
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"model", "image_proj_model"}
    freeze(model, "all")
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"first_stage_model"}
    with pytest.raises(ConfigError, match=r"no such part \['vae'\]"):
        freeze(model, "unet+vae")


def test_muon_takes_matrices_of_linear_layers_and_adamw_the_rest():
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 16), torch.nn.Linear(16, 4), torch.nn.Embedding(32, 32)
    )
    adamw, muon = torch_training.make_optimizers(model, "muon")
    chosen = [[p for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert [tuple(p.shape) for p in chosen[1]] == [(16, 32)]
    assert len(chosen[0]) == 4
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        torch_training.make_optimizers(model, "adamw")


def test_average_forgets_the_first_weights_and_swaps_back():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = torch_training.Ema(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    before = ema.state_dict()["average"]["weight"].item()
    ema.update(layer)
    ema.swap(layer)
    assert layer.weight.item() == pytest.approx(before + (2 - before) * (1 - 2 / 11))
    ema.swap(layer)
    assert layer.weight.item() == 2.0
    np.testing.assert_allclose(torch_training.cosine_lr(9, 100, 1.0, 10), 1.0)


def test_folder_of_another_model_is_not_trained_into(inputs, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(DataError, match="exists and holds nothing to go on with .no progress.pt"):
        _train(inputs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "flag", ["--lr=nan", "--ema=1", "--warmup=-1", "--weight=policy=nan", "--eta=2", "--clip=0"]
)
def test_numbers_that_cannot_train_are_refused(inputs, tmp_path, flag):
    with pytest.raises(SystemExit):
        train_world_model.main([*_arguments(inputs, tmp_path), flag])
