import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

from algos.types import path_name
from benchmarks import cost_model, flops
from benchmarks.cost_model import Hardware, Policy, Work
from evac_jax import programs
from evac_jax.config.build import default_config
from evac_jax.devices import sharding
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import EvacModel
from evac_jax.miniature.sizes import POLICY, WORLD_MODEL
from evac_jax.shapes import EpisodeShapes
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools.memory.account import account
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


@pytest.mark.slow
def test_compiled_update_receives_what_the_law_says():
    sizes = dataclasses.replace(
        POLICY,
        num_layers=6,
        hidden_size=128,
        intermediate_size=512,
        scan_layers=True,
        remat="full",
    )
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        algo=dataclasses.replace(config.algo, group_size=4, global_batch=64, micro_batch=32),
        env=dataclasses.replace(config.env, num_envs=16, max_episode_steps=4 * sizes.chunk),
    )
    episode = EpisodeShapes((1, 64, 64, 3), sizes.chunk, 4 * sizes.chunk)
    data, fsdp = 2, 2
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[:4])
    program, arguments = programs.abstract_update(config, mesh, sizes, episode)
    options = {"xla_backend_optimization_level": 0}
    found = account(program.lower(*arguments).compile(compiler_options=options).as_text())
    # At this size XLA moves what the projector multiplies rather than its weights, and embedding
    # and output head are never gathered whole; but their gradients are summed like all others.
    cut = jax.tree_util.tree_leaves_with_path(arguments[0].params)
    layers = sum(
        leaf.size
        for path, leaf in cut
        if re.search("layers|blocks", path_name(path)) and not leaf.sharding.is_fully_replicated
    )
    everything = sum(leaf.size for _, leaf in cut)
    work = Work(envs=1, rounds=1, chunks=16, micro_batch=8, optimizer_batch=16, weight_bytes=4)
    work = dataclasses.replace(work, gradient_bytes=4)
    gathered = cost_model.update_bytes(Policy(sizes, layers), work, fsdp, data)["weights"]
    law = cost_model.update_bytes(Policy(sizes, everything), work, fsdp, data)
    assert found.received("all-gather") == pytest.approx(gathered, rel=0.15)
    # A CPU has no reduce-scatter. It sums whole gradients, which is twice as much.
    summed = 2 * law["gradients"] + law["sums"]
    assert found.received("all-reduce") == pytest.approx(summed, rel=0.15)


def test_more_chips_receive_more_and_compute_the_same_each():
    sizes = (Work(), EvacConfig(), Policy(OpenVLAOFTConfig(), 7.5e9))
    one, eight, many = (
        cost_model.iteration(chips, Hardware.of("h100"), *sizes) for chips in (1, 8, 64)
    )
    assert one.link_s == 0
    assert one.compute_s == eight.compute_s == many.compute_s
    assert sum(eight.outside_bytes.values()) == 0
    assert eight.link_s < many.link_s
    # Eight GPUs that share one copy: 256 micro-batches, weights twice and gradients once, 2 bytes.
    assert eight.chip_bytes["weights"] == pytest.approx(256 * 2 * 7.5e9 * 2 * 7 / 8)
    assert eight.chip_bytes["gradients"] == pytest.approx(256 * 7.5e9 * 2 * 7 / 8)
    # Between 8 hosts a ring sums every gradient once in each of the 32 optimiser steps, 4 bytes.
    assert many.outside_bytes["sums"] == pytest.approx(32 * 2 * 7.5e9 * 4 * 7 / 8)
    assert many.outside_bytes["weights"] == 0


def test_adapters_over_a_whole_base_exchange_only_their_own_gradients():
    policy, work = Policy(OpenVLAOFTConfig(), 1e8, 7.5e9), Work(fsdp=1)
    cost = cost_model.iteration(64, Hardware.of("h100"), work, EvacConfig(), policy)
    assert cost.chip_bytes["sums"] == pytest.approx(32 * 2 * 1e8 * 4 * 63 / 64)
    assert cost.outside_bytes["sums"] == pytest.approx(32 * 2 * 1e8 * 4 * 7 / 8)
    assert cost.chip_bytes["weights"] == cost.chip_bytes["deciding"] == 0
    assert policy.update == pytest.approx((4 - 75 / 76) * flops.forward(policy.sizes))


def test_more_of_the_links_hidden_means_less_time_and_other_simulators():
    sizes = (8, Work(), EvacConfig(), Policy(OpenVLAOFTConfig(), 7.5e9))

    def cost(hidden):
        chips, *rest = sizes
        return cost_model.iteration(chips, Hardware.of("h100", hidden=hidden), *rest)

    nothing, half, all_of_it = cost(0.0), cost(0.5), cost(1.0)
    assert nothing.expected_s == nothing.total_s
    assert all_of_it.expected_s == all_of_it.compute_s
    assert half.expected_s == pytest.approx((nothing.total_s + all_of_it.compute_s) / 2)
    # Simulators and learner take as long as each other.
    assert half.imagine_s / half.simulators == pytest.approx(half.expected_s - half.imagine_s)


def test_chips_that_do_not_fill_hosts_are_refused():
    policy = Policy(OpenVLAOFTConfig(), 7.5e9)
    with pytest.raises(ValueError, match="multiple of 8 per host"):
        cost_model.iteration(12, Hardware.of("h100"), Work(), EvacConfig(), policy)


@pytest.mark.parametrize(("section", "flags"), [("full", []), ("lora", ["--lora"])])
def test_page_of_scaling_holds_what_the_command_prints(section, flags, monkeypatch, capsys):
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    tables = page.split("| chip | chips |")[1:]
    lines = dict(zip(("full", "lora"), tables, strict=True))[section].split("\n\n")[0].splitlines()
    shown = [line.strip("| ").split(" | ") for line in lines[2:]]
    monkeypatch.setattr("sys.argv", ["cost_model", *flags])
    cost_model.main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[3:-1]]
    printed = [row for row in printed if row[0] in {row[0] for row in shown}]
    assert len(shown) == len(printed)
    for row, expected in zip(shown, printed, strict=True):
        assert row[0] == expected[0]
        for cell, value in zip(row[1:], expected[1:], strict=True):
            decimals = len(cell.partition(".")[2])
            assert float(cell) == round(float(value), decimals)
