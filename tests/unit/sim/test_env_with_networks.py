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
from evac_jax.files import cards, recordings
from evac_jax.miniature.starts import MiniatureStarts
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.env import make
from evac_jax.sim.pose_model import PoseModel, PoseModelConfig
from evac_jax.sim.recorded_starts import FolderStarts, RecordedStarts
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


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two tasks in turn: frames are noise, the instruction is all that the classifier gets."""
    folder = tmp_path_factory.mktemp("recordings")
    write_recording(folder / "ours", INSTRUCTIONS)
    write_recording(folder / "turned", INSTRUCTIONS[::-1])
    return folder


def write_recording(folder, instructions):
    """Write the same twelve episodes with their instructions listed in some order."""
    rng = np.random.default_rng(0)
    with recordings.EpisodeWriter(
        folder,
        image_shape=(1, 32, 32, 3),
        instructions=instructions,
        sources=["x"],
        intrinsic=np.diag([40.0, 40, 1])[None],
        c2w=np.eye(4)[None],
        facts={},
    ) as writer:
        for n in range(12):
            writer.add(
                frames=rng.integers(0, 256, (2, 1, 32, 32, 3), dtype=np.uint8),
                actions=np.zeros((1, 7), np.float32),
                poses=np.tile(np.array([0, 0, 1, 0, 0, 0, 1, 0], np.float32), (2, 1)),
                success=np.zeros(2, bool),
                task=instructions.index(INSTRUCTIONS[n % 2]),
                source=0,
            )


def judged(folders, source):
    """Texts [4] and the classifier's probabilities [4 chunk] of the first four starts."""
    settings = {"num_envs": 4, "steps": 1, "eta": 0.0, "max_episode_steps": 2, "threshold": 1.0}
    env = make({**folders, **settings}, source)
    seen, classify = [], env._watch.judge

    def record(rows, frames, task):
        seen.append(classify(rows, frames, task))
        return seen[-1]

    env._watch.judge = record
    frames = torch.zeros(4, *env.spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(0, 2, *env.spec.image_shape).byte()
    result = env.reset(np.arange(4), 0, frames, clip)
    env.step(np.zeros((4, 2, 7), np.float32), frames, clip)
    return [env.spec.instructions[task] for task in result.task], seen[0]


@pytest.fixture
def told(folders, tmp_path):
    """Weights whose classifier depends on the instruction, and says which it knows."""
    torch.manual_seed(1)
    net = RewardNet(RewardConfig(width=4, num_instructions=2))
    for table in net.instruction:
        torch.nn.init.normal_(table.weight)
    save_model(tmp_path / "reward", net)
    cards.write_json(tmp_path / "reward" / "card.json", {"instructions": INSTRUCTIONS})
    return {**folders, "reward": str(tmp_path / "reward")}


def test_imagination_is_judged_alike_when_a_recording_lists_its_instructions_otherwise(
    told, recording
):
    texts, ours = judged(told, FolderStarts(str(recording / "ours")))
    turned_texts, turned = judged(told, FolderStarts(str(recording / "turned")))
    assert set(texts) == set(INSTRUCTIONS)
    assert turned_texts == texts
    assert torch.equal(turned, ours)


def test_recording_of_one_of_two_tasks_is_judged_as_that_task(told, recording):
    data = recordings.load(recording / "ours").split()[0]
    mine = np.flatnonzero(data.task == 1)[:4]
    texts, alone = judged(told, RecordedStarts(data.select(mine)))
    assert texts == [INSTRUCTIONS[1]] * 4
    both = RecordedStarts(data.select(np.append(mine, np.flatnonzero(data.task == 0))))
    assert torch.equal(judged(told, both)[1], alone)


def test_world_says_that_it_cannot_match_tasks_when_a_classifier_has_no_card(folders, recording):
    env = make({**folders, "steps": 1}, FolderStarts(str(recording / "ours")))
    (note,) = env.spec.notes
    assert "no card.json" in note
