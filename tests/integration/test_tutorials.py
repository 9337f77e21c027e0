"""docs/tutorials, command by command, at small sizes."""

import json
import re
import signal
import subprocess
import sys

import pytest

from evac_jax.files import recordings
from evac_jax.tools.episodes import export_lerobot
from evac_jax.tools.world import pack
from tests.integration import pages, tiny_weights, toy_world
from tests.unit.tools.world import folders

PLACE = "--config.log.dir={folder}/runs "
ALIKE = (
    "--config.env.num_envs=8 --config.env.max_episode_steps=16 "
    "--config.algo.group_size=4 --config.algo.global_batch=8 --config.algo.micro_batch=8 "
    "--config.simulator.processes=1 --config.eval.episodes=4 --config.eval.ground_truth_episodes=8 "
    "--config.eval.ground_truth_envs=8 --config.video.save=False "
)
RUN = f"{PLACE} {ALIKE} --config.train.iterations=2"
# Rewards must differ within a group, so the miniature's own parts play, and whole episodes.
LEARNS = (
    f"{ALIKE} --config.env.num_envs=16 --config.env.max_episode_steps=32 --config.rollout.epochs=2 "
    "--config.algo.group_size=8 --config.algo.global_batch=64 --config.algo.micro_batch=32 "
)
# The tiny parts in the place of the miniature's.
MINIATURE = (
    "--config.policy.checkpoint={folder}/policy --config.reward.checkpoint={folder}/reward "
    "--config.world_model.checkpoint={folder}/world_model --config.world_model.steps=1 "
    "--config.env.pose_model={folder}/pose_model "
)
SMALL = {
    "first_run": {
        "launch.py": f"{PLACE} {ALIKE} {MINIATURE}",
        "runs.report": "",
        "policy.export": "",
    },
    "checkpoint": {
        "world.pack": "--horizon 16 --unnorm_key miniature --ground_truth none --steps 1 "
        "--train_starts 0,3 --eval_starts 3,5",
        "world.check": "",
        "memory": "",
        "launch.py": f"{RUN} --config.rollout.epochs=1 --config.simulator.devices=('cpu',) "
        "--config.policy.compute_dtype=float32 --config.simulator.dtype=float32 "
        "--config.libero.python=",
        "policy.export": "",
    },
    "algorithm": {
        "launch.py": f"{PLACE} {LEARNS} --config.train.iterations=1",
        "runs.sweep": f"{LEARNS} --config.train.iterations=1 --seeds 0",
    },
    "robot": {
        "import_lerobot": "--camera {folder}/dataset/meta/camera.json "
        "--images observation.images.view_0 --image_size 64",
        "policy.train": "--steps 4 --batch 4",
        "launch.py": RUN,
    },
}
SERVE = "--config.serve.port=0 --config.serve.image_sizes=('64x64',)"
# In the place of openpi's client and of a robot.
CLIENT = """
import os
from benchmarks.policy_client import Client

class WebsocketClientPolicy(Client):
    def __init__(self, host, port):
        super().__init__(int(os.environ["PORT"]))
"""
ROBOT = """
import numpy as np

class Robot:
    def reset(self):
        self.moves = 0
    def frame(self):
        return np.full((64, 64, 3), 100 + self.moves, np.uint8)
    def pose(self):
        return [0.01 * self.moves, 0, 0.2, 0, 0, 0, 1, 1]
    def move(self, action):
        assert action.shape == (7,) and action.dtype == np.float32
        self.moves += 1
    def succeeded(self):
        return self.moves > 30

robot = Robot()
"""


def page(repository, name: str) -> pages.Page:
    return pages.Page(repository / "docs" / "tutorials" / f"{name}.md", SMALL[name])


def write_modules(tutorial: pages.Page, folder) -> None:
    """Write the page's files of Python, whose first lines are their names."""
    for code in tutorial.blocks("python"):
        (folder / re.match(r"# ([\w.]+)\n", code)[1]).write_text(code)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, weights):
    """Holds the parts of a world."""
    for part in folders.PARTS:
        (tmp_path / part).symlink_to(weights / part)
    return tmp_path


@pytest.mark.parametrize("name", SMALL)
def test_every_command_of_a_tutorial_is_one_of_its_table(repository, name):
    tutorial = page(repository, name)
    assert {tutorial.name_of(command) for command in tutorial.commands()} == set(SMALL[name])


@pytest.mark.slow
def test_newcomer_trains_compares_resumes_evaluates_and_exports(repository, folder):
    tutorial = page(repository, "first_run")
    first, *others = tutorial.commands()
    tutorial.run([*first, "--config.train.iterations=1"], folder, repository)
    for command in others:
        told = "--config.train.iterations=2" * (command[1] == "launch.py")
        tutorial.run([*command, *told.split()], folder, repository)
    assert [line["iteration"] for line in metrics(folder / "runs/first")] == [0, 1, 2]
    page_of_both = (folder / "runs/compare.html").read_text()
    assert "larger_groups" in page_of_both
    assert (folder / "runs/first_eval/evaluation.json").is_file()
    assert json.loads((folder / "trained/card.json").read_text())["iteration"] == 2


@pytest.mark.slow
def test_lab_packs_a_world_trains_in_it_and_exports(repository, folder):
    for mine, part in (("evac", "world_model"), ("classifier", "reward")):
        (folder / mine).symlink_to(folder / part)
    folders.record(folder / "starts")
    tutorial = page(repository, "checkpoint")
    outputs = [tutorial.run(command, folder, repository) for command in tutorial.commands()]
    assert "its parts agree" in outputs[1]
    assert "cheapest preset that fits: one_gpu_80gb" in outputs[2]
    config = json.loads((folder / "runs/lab/config.json").read_text())
    assert (config["world"], config["env"]["max_episode_steps"]) == (f"{folder}/world", 16)
    assert "apache-2.0" in (folder / "trained/README.md").read_text()


@pytest.mark.slow
def test_authors_rule_is_grpo_where_the_page_says_so(repository, folder):
    tutorial = page(repository, "algorithm")
    write_modules(tutorial, folder)
    for command in tutorial.commands():
        tutorial.run(command, folder, repository)
    grpo, softened = (metrics(folder / "runs" / f"as_{name}")[1] for name in ("grpo", "softened"))
    # Of the clock, and of what a run finds compiled already, nothing is promised.
    timeless = {name for name in grpo if not name.startswith(("time/", "log/compilations"))}
    assert {name: grpo[name] for name in timeless} == {name: softened[name] for name in timeless}
    report = (folder / "runs/softened/report.html").read_text()
    assert all(f"algo.power {power}" in report or f"power={power}" in report for power in (0, 1))
    other = metrics(folder / "runs/softened/power=0-seed=0")[1]
    assert other["rollout/advantages_max"] != grpo["rollout/advantages_max"]


@pytest.fixture
def robots_folder(folder):
    """Holds what a robot's owner brings, and the world that own_simulator.md leads to."""
    from flax import nnx

    from evac_jax.tools.policy.train import NORM_STATS
    from policies.openvla_oft.export_hf import create_policy_folder
    from policies.openvla_oft.model import OpenVLAOFT

    toy_world.write(folder / "toy")
    names = ("--data", str(folder / "toy"), "--out", str(folder / "dataset"))
    export_lerobot.main([*names, "--fps", "10"])
    policy = OpenVLAOFT(tiny_weights.SMALL_POLICY, rngs=nnx.Rngs(0))
    where = folder / "openvla_oft"
    create_policy_folder(policy, where, tasks=toy_world.INSTRUCTIONS, norm_stats=NORM_STATS)
    starts = folders.record(folder / "starts")
    told = [*folders.of(folder), "--starts", str(starts), *folders.TOLD]
    pack.main([*told, "--out", str(folder / "world")])
    (folder / "policy").unlink()  # the page makes one of this name
    (folder / "my_robot.py").write_text(ROBOT)
    (folder / "openpi_client").mkdir()
    (folder / "openpi_client" / "websocket_client_policy.py").write_text(CLIENT)
    return folder


@pytest.mark.slow
def test_owner_teaches_serves_records_and_trains(repository, robots_folder):
    folder, tutorial = robots_folder, page(repository, "robot")
    write_modules(tutorial, folder)
    for command in tutorial.commands():
        if "--mode=serve" not in command:
            tutorial.run(command, folder, repository)
            continue
        served = tutorial.arguments([*command, *SERVE.split()], folder)
        with subprocess.Popen(
            served,
            cwd=repository,
            env=pages.environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as server:
            drive(server, folder, repository)
    played = recordings.load(folder / "EPISODES", folder / "ROLLOUTS")
    assert played.num_episodes == toy_world.EPISODES + 20
    assert [line["iteration"] for line in metrics(folder / "runs/round_1")] == [0, 1, 2]


def drive(server, folder, repository) -> None:
    """Run the page's script against a server, and end it."""
    told = []
    for line in server.stdout:
        told.append(line)
        if ready := re.search(r"ready: ws://127\.0\.0\.1:(\d+)", line):
            break
    else:
        pytest.fail("".join(told))
    (folder / "EPISODES").symlink_to(folder / "episodes")
    variables = pages.environment(folder) | {"PORT": ready[1]}
    variables["PYTHONPATH"] += f":{repository}"
    try:
        subprocess.run(
            [sys.executable, "drive.py"], cwd=folder, env=variables, check=True, timeout=300
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.stdout.read()
    assert server.wait(60) == 0
