"""The environment on real, tiny, untrained networks, loaded from folders as in production."""

import numpy as np
import pytest
import torch

from evac_jax.errors import CheckpointError
from evac_jax.evac.config import (
    AutoencoderConfig,
    EvacConfig,
    ImageTowerConfig,
    MapConfig,
    ResamplerConfig,
    UNetConfig,
)
from evac_jax.evac.model import EvacModel
from evac_jax.evac.model_folders import save_model
from evac_jax.miniature.starts import MiniatureStarts
from evac_jax.sim.env import make
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.reward import RewardConfig, RewardNet

RESAMPLER = ResamplerConfig(
    dim=16, depth=1, dim_head=8, heads=2, num_queries=2, ff_mult=1, embedding_dim=14, output_dim=16
)
TINY = EvacConfig(
    image_size=(32, 32),
    chunk=2,
    n_previous=2,
    domain_id=0,
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_head_channels=16,
        init_heads=2,
        context_dim=16,
        action_tokens=2,
        num_domains=1,
    ),
    autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1, 1), num_res_blocks=1),
    action_resampler=RESAMPLER,
    image_resampler=RESAMPLER.replace(embedding_dim=16),
    image_tower=ImageTowerConfig(
        width=16, layers=1, head_width=8, patch_size=8, image_size=16, embed_dim=8
    ),
    maps=MapConfig(renderer="upstream", radius=2, thickness=1, arms=1),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = EvacModel(TINY)
    for parameter in model.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(root / "world_model", model)
    save_model(root / "reward", RewardNet(RewardConfig(width=4, num_instructions=2)))
    save_model(root / "pose_model", PoseModel(PoseModelConfig(hidden=8)))
    return {name: str(root / name) for name in ("world_model", "reward", "pose_model")}


def play(folders, **settings):
    """Frames [4 B ..], rewards, seconds, clips of three chunks; environment 1 ends after one."""
    env = make(
        {
            **folders,
            "num_envs": 3,
            "steps": 2,
            "eta": 1.0,
            "max_episode_steps": 6,
            "threshold": 1.0,
            **settings,
        },
        MiniatureStarts(num_starts=9, image_size=32),
    )
    frames = torch.zeros(3, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(env.spec.clip_envs, env.spec.action.chunk, *env.spec.image_shape).byte()
    env.reset(np.array([4, 4, 8]), 7, frames, clip)
    seen, rewards, clips = [frames.clone()], [], []
    rng = np.random.default_rng(0)
    for _ in range(3):
        result = env.step(rng.normal(size=(3, 2, 7)).astype(np.float32), frames, clip)
        env.episodes.terminated[1] = True
        seen.append(frames.clone())
        rewards.append(result.rewards)
        clips.append(clip.clone())
    env.close()
    return torch.stack(seen).int(), np.stack(rewards), result.seconds, torch.stack(clips).int()


def test_other_environments_imagine_the_same_when_one_is_left_out(folders):
    whole, rewards, _, _ = play(folders, skip_finished=False)
    compact, compact_rewards, seconds, _ = play(folders, skip_finished=True)
    running = [0, 2]
    # Batch size changes the order of sums inside the networks, so one grey level may tip over.
    assert (whole[:, running] - compact[:, running]).abs().max() <= 1
    np.testing.assert_array_equal(rewards, compact_rewards)
    assert (compact[1, 1] == compact[3, 1]).all()
    assert (whole[1, 1] != whole[3, 1]).any()
    assert {"poses", "imagine", "classify", "frames"} <= seconds.keys()


def test_group_members_start_alike_and_then_go_their_own_way(folders):
    frames, _, _, _ = play(folders, max_batch=2)
    assert (frames[0, 0] == frames[0, 1]).all()
    assert (frames[0, 0] != frames[0, 2]).any()
    assert (frames[1, 0] != frames[1, 1]).any()


def test_frames_are_the_same_when_only_the_last_ones_are_judged(folders):
    whole, _, _, clips = play(folders, clip_envs=3)
    part, _, _, part_clips = play(folders, clip_envs=3, judged_frames=1)
    assert (whole - part).abs().max() <= 1
    assert (clips - part_clips).abs().max() <= 1
    assert (clips[:, :, 0] != clips[:, :, 1]).any()


def test_it_runs_in_half_precision(folders):
    frames, rewards, _, _ = play(folders, dtype="bfloat16", clip_envs=1)
    assert np.isfinite(rewards).all()
    assert (frames[1] != frames[0]).any()


def test_weights_of_another_kind_are_refused(folders):
    with pytest.raises(CheckpointError, match="expected a model of kind RewardNet"):
        play({**folders, "reward": folders["pose_model"]})
