import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch

from evac_jax.errors import DataError
from evac_jax.evac import model_folders
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.config import AutoencoderConfig
from evac_jax.files import cards, recordings
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.tools.world_model import gate
from tests.unit.evac import tiny
from tests.unit.tools import tiny_recording

LENGTH = 8
LIFTS_AT, DONE_AT = 3, 6


def _write(folder, count=24):
    """Grey pictures with a white thing. Every second episode lifts it and puts it to the right."""
    camera, rng = tiny.camera(), np.random.default_rng(0)
    with EpisodeWriter(
        folder,
        image_shape=(1, 32, 32, 3),
        instructions=["do it"],
        sources=["script"],
        intrinsic=camera.intrinsic[0].numpy(),
        c2w=camera.c2w[0].numpy(),
        facts={},
    ) as writer:
        for n in range(count):
            things = np.full((LENGTH + 1, 3, 3), np.nan, np.float32)
            things[:, 0] = [-0.3, 0, 0]
            success = np.zeros(LENGTH + 1, bool)
            if n % 2:
                things[LIFTS_AT:, 0, 2] = 0.05
                things[DONE_AT:, 0] = [0.3, 0, 0]
                success[DONE_AT:] = True
            frames = rng.integers(90, 110, (LENGTH + 1, 1, 32, 32, 3), dtype=np.uint8)
            for frame, (x, y, z) in zip(frames, things[:, 0], strict=True):
                column, row = (round(float(16 + 30 * p / (z + 1))) for p in (x, y))
                frame[0, row - 2 : row + 2, column - 2 : column + 2] = 255
            poses = np.zeros((LENGTH + 1, 8), np.float32)
            poses[:, :3], poses[:, 6] = [-0.3, 0, 0.05], 1
            writer.add(
                frames=frames,
                actions=np.zeros((LENGTH, 7)),
                poses=poses,
                success=success,
                task=0,
                source=0,
                held_out=n % 4 > 1,
                objects=things,
            )
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("gate") / "data")


def test_thing_is_held_between_lifting_and_success_and_then_on_its_goal(recording):
    data = recordings.load(recording)
    held, done, place = gate.moments(data)
    steps = (held - data.first.repeat(data.length + 1)[held]).tolist()
    assert sorted(set(steps)) == list(range(LIFTS_AT, DONE_AT))
    assert len(held) == 12 * (DONE_AT - LIFTS_AT)
    np.testing.assert_array_equal(done, np.flatnonzero(data.success))
    np.testing.assert_array_equal(place, data.objects[:, 0])


def test_psnr_counts_whole_frames_or_a_quarter_round_the_thing(recording):
    data = recordings.load(recording)
    _, done, place = gate.moments(data)
    frames = np.array(data.frames)
    frames[done, 0, :, 20:] -= 10  # the thing is at column 25: its square begins at 21
    worse = dataclasses.replace(data, frames=frames)
    near = gate.psnr(data, worse, done, place)
    assert near == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    share = 12 / 32  # of the columns
    whole = gate.psnr(data, worse, done, None)
    assert whole == pytest.approx(near - 10 * np.log10(share), abs=1e-3)


def test_recording_that_tells_no_places_is_refused(tmp_path):
    data = recordings.load(tiny_recording.write(tmp_path / "data"))
    with pytest.raises(DataError, match="no recording tells where the thing is"):
        gate.moments(data)


def test_probe_sees_success_in_pictures_that_show_it_and_nothing_in_black_ones(recording):
    training, held_out = recordings.load(recording).split()
    args = argparse.Namespace(width=8, steps=80, seed=0, device="cpu", margin=(0, 0))
    assert gate.probe(training, held_out, args) > 0.9
    black = (
        dataclasses.replace(part, frames=np.zeros_like(part.frames))
        for part in (training, held_out)
    )
    assert gate.probe(*black, args) == 0.5


def _arguments(recording, folder):
    torch.manual_seed(0)
    sizes = AutoencoderConfig(channels=8, channel_mult=(1, 1), num_res_blocks=1, norm_groups=4)
    model_folders.save_model(folder / "ae", Autoencoder(sizes))
    arguments = f"--data {recording} --autoencoder {folder / 'ae'} --out {folder / 'out'}"
    return f"{arguments} --steps 2 --width 8 --margin 1 0 --device cpu"


def _named_otherwise(folder):
    """Let config.json name the weights, as for a file of others."""
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"weights": "best.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))


def test_command_ends_with_the_five_figures_and_writes_them(recording, tmp_path, capsys):
    arguments = _arguments(recording, tmp_path)
    _named_otherwise(tmp_path / "ae")
    gate.main(arguments.split())
    line = capsys.readouterr().out.splitlines()[-1]
    told = dict(part.split("=") for part in line.split())
    names = ["psnr", "psnr_held", "psnr_on_goal", "probe_original", "probe_decoded"]
    assert list(told) == names
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    scores = card["scores"]
    assert card["autoencoder"] == cards.sha256(tmp_path / "ae" / "best.safetensors")
    assert {name: f"{scores[name]:.3f}" for name in names} == told
    with pytest.raises(DataError, match="--out: .*out exists; choose another folder"):
        gate.main(arguments.split())


def test_figures_are_told_where_the_card_cannot_be_written(
    recording, tmp_path, monkeypatch, capsys
):
    arguments = _arguments(recording, tmp_path)
    monkeypatch.setattr(gate, "measure", lambda *_: {"psnr": 20.0})

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cards, "write_json", full)
    with pytest.raises(OSError, match="disk full"):
        gate.main(arguments.split())
    assert capsys.readouterr().out == "psnr=20.000\n"
    assert not (tmp_path / "out").exists()
