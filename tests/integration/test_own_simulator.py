"""docs/own_simulator.md, command by command, from episodes of a world that is not shipped."""

import json

import pytest

from evac_jax.config.world import World
from tests.integration import pages, toy_world

SMALL_NETS = "--config={folder}/sizes.json"
# What makes each command small; of options that come twice, the last one holds.
SMALL = {
    "train_autoencoder": f"{SMALL_NETS} --steps 15 --batch 4",
    "world_model.train": f"{SMALL_NETS} --steps 10 --batch 2 --warmup 5 --validation_windows 2 "
    "--rollouts 1 --rollout_chunks 1 --save_every 10",
    "train_pose_model": "--steps 100 --hidden 16",
    "imagine_dataset": "--episodes 24",
    "reward.train": "--steps 80 --width 4 --false_success 0.9",
    "trust": "--episodes 4",
    "policy.train": "--steps 4 --batch 4",
    "world.pack": f"--horizon {toy_world.STEPS}",
    "world.check": "",
    "launch.py": "--config.log.dir={folder}/runs --config.train.iterations=2 "
    "--config.env.num_envs=8 --config.algo.group_size=4 --config.algo.global_batch=8 "
    "--config.algo.micro_batch=8 "
    "--config.simulator.processes=1 --config.eval.episodes=4 --config.video.save=False",
    "policy.export": "",
}


@pytest.fixture(scope="module")
def page(repository) -> pages.Page:
    return pages.Page(repository / "docs" / "own_simulator.md", SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds what a user brings: episodes, a start policy and sizes."""
    from flax import nnx

    from evac_jax.evac.config import AutoencoderConfig
    from evac_jax.miniature.sizes import WORLD_MODEL
    from evac_jax.tools.policy.train import NORM_STATS
    from policies.openvla_oft.export_hf import create_policy_folder
    from policies.openvla_oft.model import OpenVLAOFT
    from tests.integration.tiny_weights import SMALL_POLICY

    folder = tmp_path_factory.mktemp("own")
    toy_world.write(folder / "episodes")
    policy = OpenVLAOFT(SMALL_POLICY, rngs=nnx.Rngs(0))
    create_policy_folder(
        policy, folder / "openvla_oft", tasks=toy_world.INSTRUCTIONS, norm_stats=NORM_STATS
    )
    sizes = WORLD_MODEL.replace(
        autoencoder=AutoencoderConfig(
            channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4
        ),
        unet=WORLD_MODEL.unet.replace(channel_mult=(1, 1)),
    )
    (folder / "sizes.json").write_text(json.dumps(sizes.to_dict()))
    return folder


def test_every_command_of_the_page_is_one_of_the_table(page):
    assert {page.name_of(command) for command in page.commands()} == set(SMALL)
    assert {command[0] for command in page.commands()} == {"PY"}


@pytest.mark.slow
def test_page_leads_from_episodes_to_a_trained_policy_and_its_success(page, repository, folder):
    outputs = [page.run(command, folder, repository) for command in page.commands()]
    card = World.read(str(folder / "world")).card
    assert card.instructions == toy_world.INSTRUCTIONS
    assert card.policy.unnorm_key == "my_robot"
    assert (card.imagining.steps, card.judging.judged_frames) == (2, 2)
    assert card.starts.train == (0, toy_world.EPISODES - 8)

    run_folder = folder / "runs" / "first"
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    trained = [line for line in map(json.loads, lines) if "actor/loss" in line]
    assert [line["iteration"] for line in trained] == [1, 2]
    config = json.loads((run_folder / "config.json").read_text())
    assert config["world"] == str(folder / "world")
    assert config["env"]["max_episode_steps"] == toy_world.STEPS
    evaluation = json.loads((folder / "runs" / "first_eval" / "evaluation.json").read_text())
    assert evaluation["iteration"] == 2
    assert evaluation["success"]["imagined"]["episodes"] == 4
    assert "its parts agree" in outputs[-4]  # of world.check
    exported = json.loads((folder / "trained" / "card.json").read_text())
    assert (exported["iteration"], exported["gripper"]) == (2, "libero")
