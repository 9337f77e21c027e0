import json

import pytest
import torch
from safetensors.torch import load_file

from evac_jax.evac import model_folders
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
