import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model, flops, partition
from benchmarks.collectives import collectives
from benchmarks.cost_model import Hardware, Work
from evac_jax.devices import sharding
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.miniature.sizes import POLICY, WORLD_MODEL
from evac_jax.sim.reward import RewardConfig, RewardNet
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.model import OpenVLAOFT
from policies.types import ObsBatch

SMALL_UNET = dataclasses.replace(WORLD_MODEL.unet, channel_mult=(1, 2, 2), num_res_blocks=2)
DEEPER = dataclasses.replace(WORLD_MODEL, unet=SMALL_UNET, n_view=2)


def _counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [WORLD_MODEL, DEEPER], ids=["miniature", "two views"])
def test_world_model_formulae_count_what_torch_counts(config):
    views, latent = config.n_view, config.autoencoder.latent_channels
    frames, (height, width) = config.frames, config.latent_size
    rays = config.unet.in_channels - latent
    tower = config.image_tower
    with torch.device("meta"), torch.no_grad():
        model = EvacModel(config).eval().requires_grad_(False)
        reward = RewardNet(RewardConfig()).eval().requires_grad_(False)
        tokens = config.image_tokens + config.unet.action_tokens
        context = torch.empty(views, tokens, config.unet.context_dim)
        prepared = model.unet.prepare_context(context, views)
        x = torch.empty(views, latent, frames, height, width)
        concat = torch.empty(views, rays, frames, height, width)
        times = torch.empty(views, dtype=torch.int64)
        image = torch.empty(1, 3, *config.image_size)
        patches = (tower.image_size // tower.patch_size) ** 2 + 1
        seen = torch.empty(1, patches, tower.width)
        encode, decode = flops.autoencoder(config.autoencoder, config.image_size)
        expected = {
            _counted(lambda: model.velocity(x, times, concat, prepared)): flops.unet(config),
            _counted(lambda: model.unet.prepare_context(context, views)): flops.context(config),
            _counted(lambda: model.encode(image)): encode,
            _counted(lambda: model.decode(torch.empty(1, latent, height, width))): decode,
            _counted(lambda: reward(image)): flops.classifier(64, config.image_size),
            _counted(lambda: model.image_proj_model(seen)): flops.resampler(
                config.image_resampler, patches, config.image_tokens
            ),
            _counted(
                lambda: model.embedder.tokens(torch.empty(1, 3, *(tower.image_size,) * 2))
            ): flops.image_tower(tower),
        }
    for counted, formula in expected.items():
        assert formula == counted


def test_full_size_denoiser_costs_what_the_specification_says():
    # 3661 GFLOP there, with the context's keys and values once per frame.
    config = EvacConfig()
    per_frame = flops.unet(config) + config.frames * flops.context(config)
    assert per_frame == pytest.approx(3661e9, rel=0.01)


def test_policy_formulae_count_what_xla_counts():
    sizes = dataclasses.replace(
        POLICY, num_layers=2, hidden_size=128, intermediate_size=384, value_type="action_level"
    )
    graphdef, params, rest = nnx.split(OpenVLAOFT(sizes, rngs=nnx.Rngs(0)), nnx.Param, ...)
    batch, length = 2, sizes.max_prompt_length
    obs = ObsBatch(
        images=jnp.zeros((batch, 1, sizes.image_size, sizes.image_size, 3), jnp.uint8),
        prompt_tokens=jnp.ones((batch, length), jnp.int32),
        prompt_mask=jnp.ones((batch, length), bool),
    )
    tokens = jnp.full((batch, sizes.chunk, sizes.action_dim), sizes.first_action_token)

    def objective(params, rest, obs, tokens):
        out = nnx.merge(graphdef, params, rest).evaluate(obs, tokens)
        return out.log_probs.sum() + out.values.sum()

    def counted(function) -> float:
        lowered = jax.jit(function).lower(params, rest, obs, tokens)
        return lowered.cost_analysis()["flops"] / batch

    assert counted(objective) == pytest.approx(flops.forward(sizes), rel=0.1)
    assert counted(jax.grad(objective)) == pytest.approx(3 * flops.forward(sizes), rel=0.1)


PROGRAM = """HloModule update

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8,4]{1,0} all-gather(f32[1,4]{1,0} %w), dimensions={0}
  %r = (f32[16]{0}, bf16[2,3]{1,0}) all-reduce-start(f32[16]{0} %a, bf16[2,3]{1,0} %b)
}

%other (p: f32[2]) -> f32[2] {
  %unused = f32[1000]{0} all-gather(f32[500]{0} %w), dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w1 = (s32[], f32[8]{0}) while((s32[], f32[8]{0}) %t), body=%body, condition=%c, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %p = u8[10]{0} collective-permute(u8[10]{0} %y)
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    assert collectives(PROGRAM) == {
        "all-gather": {"count": 5, "bytes": 5 * 8 * 4 * 4},
        "all-reduce": {"count": 5, "bytes": 5 * (16 * 4 + 6 * 2)},
        "collective-permute": {"count": 1, "bytes": 10},
    }


@pytest.mark.slow
def test_compiled_update_sends_what_the_law_of_fsdp_says():
    sizes = dataclasses.replace(
        POLICY,
        num_layers=6,
        hidden_size=128,
        intermediate_size=512,
        scan_layers=True,
        remat="full",
    )
    data, fsdp = 2, 2
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[:4])
    options = {"xla_backend_optimization_level": 0}
    program, params = partition.compile_update(sizes, mesh, frame=64, options=options)
    told = partition.account(program, partition.cut_entries(params), (data, fsdp))
    sent = {kind: found["bytes"] for kind, found in told["sent"].items()}
    # At this size XLA moves what the projector multiplies rather than its weights, and embedding
    # and output head are never gathered whole.
    layers = partition.cut_entries(params, "layers|blocks")
    micro = cost_model.fsdp_bytes(layers, Work(weight_bytes=4), fsdp, data)
    assert sent["all-gather"] == pytest.approx(partition.MICRO_BATCHES * micro["gather"], rel=0.1)
    assert sent["all-reduce"] == pytest.approx(told["law"]["all-reduce"], rel=0.2)


def test_more_gpus_send_more_and_compute_the_same_each():
    sizes = (EvacConfig(), OpenVLAOFTConfig(), 7.5e9)
    one, eight, many = (
        cost_model.iteration(gpus, Hardware(), Work(), *sizes) for gpus in (1, 8, 64)
    )
    assert one.link_s == 0
    assert one.compute_s == eight.compute_s == many.compute_s
    assert sum(eight.host_bytes.values()) == 0
    assert eight.link_s < many.link_s
    # Eight GPUs that share one copy: 256 micro-batches, weights twice and gradients once, 2 bytes.
    assert eight.gpu_bytes["weights"] == pytest.approx(256 * 2 * 7.5e9 * 2 * 7 / 8)
    assert eight.gpu_bytes["gradients"] == pytest.approx(256 * 7.5e9 * 2 * 7 / 8)
    # Between 8 hosts a ring sends each gradient shard 2 x 7/8 times, 8 shards per host.
    assert many.host_bytes["gradients"] == pytest.approx(256 * 2 * 7.5e9 * 2 * 7 / 8)


def test_gpus_that_do_not_fill_hosts_are_refused():
    with pytest.raises(ValueError, match="multiple of 8 per host"):
        cost_model.iteration(12, Hardware(), Work(), EvacConfig(), OpenVLAOFTConfig(), 7.5e9)


def test_page_of_scaling_holds_what_the_command_prints(monkeypatch, capsys):
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    table = page.split("| GPUs | episodes |")[1].split("\n\n")[0].splitlines()[2:]
    shown = [line.strip("| ").split(" | ") for line in table]
    monkeypatch.setattr("sys.argv", ["cost_model"])
    cost_model.main()
    printed = [line.split()[:10] for line in capsys.readouterr().out.splitlines()[3:-1]]
    assert len(shown) == len(printed) == 4
    for row, expected in zip(shown, printed, strict=True):
        for cell, value in zip(row, expected, strict=True):
            decimals = len(cell.partition(".")[2])
            assert float(cell) == round(float(value), decimals)
