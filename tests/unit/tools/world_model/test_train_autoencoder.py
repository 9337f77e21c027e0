import json

import pytest
import torch
from safetensors.torch import load_file

from evac_jax.errors import CheckpointError, DataError, TrainingError
from evac_jax.evac import model_folders
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.config import AutoencoderConfig
from evac_jax.tools import torch_training
from evac_jax.tools.world_model import train_autoencoder
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording

SIZES = tiny.TINY.replace(
    autoencoder=AutoencoderConfig(
        channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4
    )
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_recording.write(tmp_path_factory.mktemp("recording") / "data", views=2)


def _train(data, out, **options):
    sizes = out.with_suffix(".json")
    sizes.write_text(json.dumps(SIZES.to_dict()))
    options = {"data": data, "out": out, "config": sizes, "steps": 4, "batch": 8} | options
    options |= {"save_every": 2, "device": "cpu"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    train_autoencoder.main(arguments)
    return load_file(out / "model.safetensors")


def test_autoencoder_learns_and_stores_latents_of_unit_spread(data, tmp_path):
    _train(data, tmp_path / "short", steps=1)
    _train(data, tmp_path / "long", steps=30)
    short, long = (
        json.loads((tmp_path / name / "card.json").read_text()) for name in ("short", "long")
    )
    assert long["scores"]["psnr_maps"] > short["scores"]["psnr_maps"] + 1
    model = model_folders.load_model(tmp_path / "long", kind="Autoencoder")
    assert model.config.scale_factor == pytest.approx(1 / long["scores"]["latent_std"], rel=1e-3)


def test_resumed_run_is_bit_for_bit_the_unbroken_one(data, tmp_path, monkeypatch):
    unbroken = _train(data, tmp_path / "unbroken")
    update = torch_training.Ema.update

    def killed_in_fourth(ema, model):
        if ema.state_dict()["updates"] == 3:
            raise KeyboardInterrupt
        update(ema, model)

    with monkeypatch.context() as patch:
        patch.setattr(torch_training.Ema, "update", killed_in_fourth)
        with pytest.raises(KeyboardInterrupt):
            _train(data, tmp_path / "broken")
    torch.testing.assert_close(_train(data, tmp_path / "broken"), unbroken, rtol=0, atol=0)


def test_new_posterior_has_little_noise_beside_means_that_differ():
    torch.manual_seed(0)
    model, images = Autoencoder(SIZES.autoencoder), torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = model.encode(images)
        train_autoencoder.start_posterior(model)
        mean, logvar = model.encode(images)
    spread = before[0].std(0).mean()  # of one place in different pictures
    assert (0.5 * before[1]).exp().mean() > 3 * spread
    assert (0.5 * logvar).exp().mean() < 0.1 * mean.std(0).mean()
    torch.testing.assert_close(mean.std(0).mean(), 4 * spread)


def test_pixels_weigh_more_where_they_differ_or_lie_near_something():
    background, near = torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    frames = background.clone()
    frames[0, 1, 0, 0] = 0.5
    near[..., 0, :] = True
    weight = train_autoencoder.pixel_weight(frames, background, near, 2.0, 8.0)
    torch.testing.assert_close(
        weight[0, 0] * (11 + 9 + 1 + 1) / 4, torch.tensor([[11.0, 9], [1, 1]])
    )


@pytest.mark.parametrize("option", ["foreground", "object_weight", "square_error"])
def test_every_term_of_the_loss_changes_the_weights(data, tmp_path, option):
    plain, other = _train(data, tmp_path / "plain", steps=1), {option: 20.0}
    other = _train(data, tmp_path / "other", steps=1, **other)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_progress_of_another_loss_is_not_continued(data, tmp_path):
    _train(data, tmp_path / "out")
    with pytest.raises(CheckpointError, match="square_error was 0.0 and is 5.0"):
        _train(data, tmp_path / "out", square_error=5.0)


def test_negative_weight_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _train(data, tmp_path / "out", object_weight=-1)
    assert (
        "--object_weight: expected a finite number, at least 0, got '-1'" in capsys.readouterr().err
    )


def test_loss_that_is_not_finite_ends_the_training_and_is_not_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_autoencoder, "_loss", lambda model, *_: (_nan(model), _nan(model)))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*lower --lr \(0.002\)"):
        _train(data, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def _nan(model):
    return sum(parameter.sum() for parameter in model.parameters()) * float("nan")


def test_folder_of_another_model_is_not_trained_into(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(DataError, match="exists and holds nothing to go on with"):
        _train(data, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
