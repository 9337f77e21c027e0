"""Memory told beforehand: what is counted, what is advised, and that no weights are needed."""

import dataclasses
import json
import math
import re

import pytest
import torch

from evac_jax.errors import ConfigError
from evac_jax.evac.config import AutoencoderConfig, EvacConfig, ImageTowerConfig, ResamplerConfig
from evac_jax.memory import trainer
from evac_jax.memory.parts import Part, peak
from evac_jax.shapes import EpisodeShapes
from evac_jax.tools.memory import __main__ as memory
from evac_jax.tools.memory import advice, layouts, simulator
from evac_jax.tools.memory.compile import Compiled
from evac_jax.tools.memory.setup import Setup
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig

TOWER = VisionTowerConfig(width=16, depth=2, heads=2, mlp_width=32)
POLICY = OpenVLAOFTConfig(
    dinov2=TOWER,
    siglip=TOWER,
    image_size=28,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
)
WORLD_MODEL = EvacConfig(
    image_size=(64, 64),
    autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    image_tower=ImageTowerConfig(width=80, layers=1),
    image_resampler=ResamplerConfig(depth=1, embedding_dim=80),
)
SMALL = ["--config.algo.global_batch=64", "--config.algo.micro_batch=8"]


@pytest.fixture(scope="module")
def small():
    """A small policy and world model in the published preset."""
    config = memory.read_config("configs/grpo.py:libero_spatial", SMALL)
    unet = dataclasses.replace(WORLD_MODEL.unet, model_channels=64, channel_mult=(1,))
    return Setup(config, POLICY, dataclasses.replace(WORLD_MODEL, unet=unet))


def _named(parts, begin):
    return next(p.num_bytes for p in parts if p.name.startswith(begin))


def _changed(setup, **values):
    values = {name.replace("__", "."): value for name, value in values.items()}
    return dataclasses.replace(setup, config=advice.changed(setup.config, values))


def _trainer(setup, devices=1, platform="cpu"):
    return trainer.trainer_parts(setup.config, setup.sizes, setup.episode, devices, platform)


def test_peak_adds_what_is_held_together():
    parts = [Part("a", 5), Part("b", 3, ("x",)), Part("c", 4, ("y",)), Part("d", 2, ("x",))]
    assert peak(parts) == (10, "x")
    assert peak([Part("a", 5)]) == (5, "")


def test_published_sizes_are_taken_when_nothing_is_there():
    config = memory.read_config("configs/grpo.py:libero_spatial")
    setup = memory.read_setup(config, "", "")
    assert sum(trainer.count(setup.sizes)) == 7_541_237_184
    assert config.policy.checkpoint == ""
    assert setup.episode == EpisodeShapes((1, 256, 256, 3), 8, 256)


def test_state_is_counted_as_the_learner_keeps_it(small):
    parts, (trained, frozen) = _trainer(small), trainer.count(small.sizes)
    assert _named(parts, "parameters that train") == 4 * trained
    assert _named(parts, "parameters that do not") == 4 * frozen
    # Two moments; Adam's own count and four figures of 4 bytes.
    assert _named(parts, "optimiser state") == 8 * trained + 20
    assert _named(parts, "start policy") == 0
    assert _named(_trainer(_changed(small, algo__kl_beta=0.1)), "start policy") == 4 * trained


def test_lora_trains_little_and_freezes_the_rest(small):
    lora = _changed(small, policy__lora_rank=4, policy__param_dtype="bfloat16")
    trained, frozen = trainer.count(lora.sizes)
    parts = _trainer(lora)
    assert trained < 0.5 * frozen
    assert _named(parts, "parameters that train") == 4 * trained  # adapters stay float32
    assert _named(parts, "parameters that do not") < 2.1 * frozen
    assert peak(parts)[0] < peak(_trainer(small))[0]


def test_activations_follow_micro_batch_and_remat(small):
    def saved(setup):
        return _named(_trainer(setup), "activations saved")

    eight, four = saved(small), saved(_changed(small, algo__micro_batch=4))
    assert four < eight
    exact = trainer._traced_bytes(small.sizes, 5, small.episode.image_shape)
    assert trainer._saved_bytes(small.sizes, 5, small.episode.image_shape) == exact
    assert saved(_changed(small, policy__remat="none")) > 2 * eight


def test_devices_share_what_the_rules_shard():
    config = memory.read_config("configs/grpo.py:libero_spatial")
    setup = memory.read_setup(config, "", "")
    whole, part = _trainer(setup, 1), _trainer(setup, 8)
    for name in ("parameters that train", "optimiser state", "gradients", "rollout: frames"):
        assert math.isclose(_named(part, name), _named(whole, name) / 8, rel_tol=0.01)
    copies = _trainer(_changed(setup, mesh__data=8, mesh__fsdp=1), 8)
    assert _named(copies, "optimiser state") == _named(whole, "optimiser state")


def test_followed_allocations_are_those_that_live_at_once():
    def chain():
        x = torch.empty(1000, device="meta")
        y = x + 1
        del x
        return y * 2

    assert simulator.peak_bytes(chain) == 8000
    assert simulator.peak_bytes(lambda: torch.empty(10, device="meta").view(2, 5)) == 40


def test_traffic_is_what_operations_read_and_write():
    x = torch.empty(1000, device="meta")
    one = torch.empty(1, device="meta")
    assert simulator.traffic_bytes(lambda: x + 1) == 8000
    assert simulator.traffic_bytes(lambda: x.view(10, 100).T[2:]) == 0
    assert simulator.traffic_bytes(lambda: x.add_(1)) == 8000
    assert simulator.traffic_bytes(lambda: torch.empty_like(x)) == 0
    # Repeated entries are read once.
    assert simulator.traffic_bytes(lambda: x + one.expand(1000)) == 8004
    query = torch.empty(2, 4, 50, 8, device="meta")
    keys = torch.empty(2, 4, 30, 8, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = 2 * (query.nbytes + keys.nbytes)  # no scores
    assert simulator.traffic_bytes(lambda: attend(query, keys, keys)) == expected


def test_simulator_grows_with_its_environments_and_dtype(small):
    def parts(**changes):
        settings = {"envs": 2, "capacity": 4, "dtype": "float32", "decoded": 8, "classifiers": 1}
        return simulator.simulator_parts(small.world_model, **settings | changes)

    one, more = parts(), parts(envs=6)
    for name in ("denoiser", "decoder", "encoder", "history"):
        assert _named(more, name) == 3 * _named(one, name)
    assert _named(parts(dtype="bfloat16"), "world model") == _named(one, "world model") / 2
    assert _named(parts(decoded=2), "decoder") < _named(one, "decoder")
    assert _named(parts(classifiers=2), "success classifiers") == 2 * _named(one, "success")


def test_separation_moves_the_simulators_off_the_training_devices(small):
    together, apart = layouts.layouts(small, 8)
    assert (together.name, apart.name) == ("collocated", "separated")
    titles = [[title for title, _, _ in place.held] for place in apart.devices]
    assert titles == [["trainer"], ["simulator process"]]
    assert apart.devices[1].held[0][2] == 2  # 8 processes on 4 devices
    assert [found.name for found in layouts.layouts(small, 1)] == ["collocated"]
    on_host = layouts.layouts(small, 0)[0]
    assert not on_host.devices
    assert on_host.host.num_bytes > together.host.num_bytes / 8


def test_advice_names_flags_that_make_it_fit(small):
    found = layouts.layout(small, 1, "collocated")
    text = advice.advice(small, 1, "collocated", 0.8 * found.device_bytes)
    assert text.startswith("fits with --config.")
    flags = [word for word in text.split() if word.startswith("--config.")]
    config = memory.read_config("configs/grpo.py:libero_spatial", [*SMALL, *flags])
    again = layouts.layout(dataclasses.replace(small, config=config), 1, "collocated")
    assert again.device_bytes <= 0.8 * found.device_bytes
    assert advice.advice(small, 1, "collocated", 1.0).startswith("not even with")


def test_cheapest_preset_is_the_one_that_needs_fewest_devices(small):
    one = _changed(small, simulator__processes=1, simulator__devices=("cuda:0",))
    setups = {"many": small, "one": one, "never": _changed(small, algo__micro_batch=3)}
    limit = layouts.layout(one, 1, "collocated").device_bytes
    lines = advice.presets_table(list(setups), setups.__getitem__, limit).splitlines()
    assert lines[1].split()[:2] == ["one", "1"]
    assert lines[-1] == "cheapest preset that fits: one"
    assert advice.presets_table(["one"], setups.__getitem__, 1.0).endswith("no preset fits")


def test_command_prints_both_sizes_from_files(small, tmp_path, capsys):
    (tmp_path / "policy.json").write_text(json.dumps(POLICY.to_hf()))
    (tmp_path / "wm.json").write_text(json.dumps({"config": small.world_model.to_dict()}))
    files = [f"--policy_config={tmp_path}/policy.json", f"--world_model_config={tmp_path}/wm.json"]
    memory.run(["--config=configs/ppo.py:libero_spatial", *files, "--devices=2", "--no_presets"])
    output = capsys.readouterr().out
    assert "collocated on 2 devices" in output
    assert "separated: fits into 80 GB a device" in output
    assert "forward pass of 32 environments" in output
    assert "frame slots (each of 8)" in output


def test_platforms_hold_temporary_arrays_in_their_own_ways(small):
    frozen = _changed(small, policy__lora_rank=4, policy__param_dtype="bfloat16")
    for setup in (small, frozen):
        cpu, gpu, tpu = (_trainer(setup, 2, name) for name in ("cpu", "cuda", "tpu"))
        held = [_named(parts, "activations of the layer") for parts in (tpu, gpu, cpu)]
        assert held == sorted(held)
        assert _named(cpu, "moments, old ones") == pytest.approx(
            0.85 * _named(cpu, "optimiser state")
        )
        assert _named(gpu, "moments of an array") == 2 * _named(gpu, "largest gradient")
    # Of the frozen base three layers are gathered on a GPU and one on a TPU, beside the adapters.
    one, three = (_named(parts, "weights gathered") for parts in (tpu, gpu))
    layer = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert three - one == 2 * layer
    # Trained weights are gathered as they are multiplied, in half of the bytes.
    assert _named(_trainer(small, 2, "cuda"), "weights gathered") == layer


def test_a_topology_shows_the_account_of_xla_beside_the_estimate(
    small, tmp_path, capsys, monkeypatch
):
    asked = []

    def compile_ahead(request, python, cache):
        asked.append((request.topology, request.program, request.flags))
        return Compiled(60.0, arguments=10**9, temporaries=10**9, peak=15 * 10**8)

    monkeypatch.setattr(memory, "compile_ahead", compile_ahead)
    (tmp_path / "policy.json").write_text(json.dumps(POLICY.to_hf()))
    (tmp_path / "wm.json").write_text(json.dumps({"config": small.world_model.to_dict()}))
    files = [f"--policy_config={tmp_path}/policy.json", f"--world_model_config={tmp_path}/wm.json"]
    command = ["--config=configs/grpo.py:libero_spatial", *files, *SMALL, "--no_presets"]
    memory.run([*command, "--topology=v6e:2x2"])
    printed = capsys.readouterr().out
    assert asked == [("v6e:2x2", "update", tuple(SMALL))]
    assert "collocated on 4 devices" in printed
    assert "fits into 34 GB a device" in printed
    assert "XLA: update, a chip of v6e:2x2 (TPU v6e (Trillium)): fits, 1.50 of 34.36 GB" in printed
    assert re.search(r"the estimate is 0\.\d\d GB", printed)
    with pytest.raises(SystemExit):
        memory.run([*command, "--topology=v6e:2x2", "--devices=4"])


def test_mistakes_are_told_in_one_message(tmp_path):
    with pytest.raises(ConfigError, match="micro_bach"):
        memory.read_config("configs/grpo.py:lora", ["--config.algo.micro_bach=8"])
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        memory.run([f"--policy_config={tmp_path / 'none.json'}"])
    with pytest.raises(ConfigError, match="multiple of the 3 training devices"):
        memory.run(["--config=configs/grpo.py:lora", "--devices=3"])
