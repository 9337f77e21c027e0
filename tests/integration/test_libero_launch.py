"""launch.py with LIBERO as ground truth, a stand-in for the simulator and a random policy.

Two tasks x two initial states are evaluated and recorded; everything but MuJoCo is the real thing.
"""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from evac_jax.files import recordings
from evac_jax.miniature.sizes import WORLD_MODEL
from evac_jax.sim.libero_tasks import instruction_of
from evac_jax.telemetry import video
from evac_jax.tools.policy.train import NORM_STATS
from evac_jax.tools.world_model.data import WindowSampler
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.model import OpenVLAOFT
from tests import xla_flags
from tests.integration.tiny_weights import SMALL_POLICY
from tests.unit.sim import libero_fakes

INSTRUCTIONS = tuple(map(instruction_of, libero_fakes.TASKS))


@pytest.fixture(scope="module")
def launch(repository, tmp_path_factory):
    """Start launch.py; returns what it printed."""
    folder = tmp_path_factory.mktemp("libero")
    model = OpenVLAOFT(SMALL_POLICY, rngs=nnx.Rngs(0))
    create_policy_folder(model, folder / "policy", tasks=INSTRUCTIONS, norm_stats=NORM_STATS)
    libero = libero_fakes.write(folder)
    settings = {
        "policy.checkpoint": folder / "policy",
        "policy.eval_temperature": 1.0,
        "world_model.checkpoint": "",
        "reward.checkpoint": "",
        "env.pose_model": "",
        "env.simulator": "ground_truth",
        "env.initial_states": "npy",
        "env.train_starts": "(0, 4)",
        "env.num_envs": 8,
        "simulator.processes": 1,
        "eval.starts": "(0, 4)",
        "eval.episodes": 0,
        "eval.ground_truth": "libero",
        "eval.ground_truth_episodes": 4,
        "eval.ground_truth_envs": 2,
        "video.episodes": 1,
        "log.dir": folder / "runs",
        **{f"libero.{name}": value for name, value in dataclasses.asdict(libero).items()},
    }
    environment = os.environ | libero_fakes.environment(folder)
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=1)}

    def run(mode, *, status=0, **changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config.{name}={value}" for name, value in (settings | changes).items()]
        done = subprocess.run(
            [sys.executable, "launch.py", "--config=configs/grpo.py", f"--mode={mode}", *flags],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done

    run.folder = folder
    return run


def test_evaluation_tells_success_by_task(launch):
    shown = launch("eval", log__run="eval").stdout
    folder = launch.folder / "runs" / "eval"
    found = json.loads((folder / "evaluation.json").read_text())
    tasks = found["by_task"]["ground_truth"]
    assert tuple(tasks) == INSTRUCTIONS
    for text, counts in tasks.items():
        assert counts["episodes"] == 2
        assert 0 <= counts["interval_95"][0] < counts["interval_95"][1] <= 1
        assert text in shown
    total = found["success"]["ground_truth"]
    assert total["episodes"] == 4
    assert total["successes"] == sum(counts["successes"] for counts in tasks.values())
    assert found["libero"]["episode_steps"] == 12
    assert found["libero"]["departures"] == [
        f"image_size {libero_fakes.SIZE} instead of 256",
        "max_steps 12 instead of 0",
    ]
    assert "instead of 256" in shown
    frames, _ = video.read_mp4(folder / "videos" / "ground_truth_iteration_00000_0.mp4")
    assert len(frames) == 1 + 16


def test_recording_repeats_in_the_simulator_and_feeds_the_world_model(launch):
    out = launch.folder / "recording"
    mix = "policy=0.5,random=0.5"
    launch("collect", collect__out=out, collect__episodes=8, collect__mix=mix)
    recordings.verify(out)
    data = recordings.load(out)
    assert data.instructions == INSTRUCTIONS
    assert data.sources == ("policy:policy@0.5", "random")
    assert data.start.tolist() == [0, 2, 1, 3] * 2  # task by task
    assert data.task.tolist() == [0, 0, 1, 1] * 2
    assert np.abs(data.actions).max() <= 1
    assert set(np.unique(data.actions[:, 6])) <= {-1, 0, 1}
    for n in range(data.num_episodes):
        rows = data.rows(np.array(n), np.arange(data.length[n] + 1))
        moved = np.cumsum(0.1 * data.actions[rows[:-1], :3], axis=0)
        at = data.poses[rows, :3]
        np.testing.assert_allclose(at[1:] - at[:1], moved, atol=1e-5)
        # What the stand-in draws is where its arm is: each frame belongs to its pose.
        drawn = data.frames[rows, 0, -2, -3]
        np.testing.assert_array_equal(drawn, np.rint(100 * np.abs(at)).astype(np.uint8))
        ends = np.flatnonzero(data.success[rows])
        assert data.length[n] == 12 or (len(ends) and data.length[n] == 8)
    config = WORLD_MODEL
    windows = WindowSampler(data, config).draw(16, np.random.default_rng(0))
    assert (windows.columns < data.length[windows.episodes, None] + 1).all()


def test_missing_libero_is_one_message_without_traceback(launch):
    done = launch("eval", status=2, libero__states="nowhere", libero__suite="libero_10")
    told = done.stderr[done.stderr.index("ConfigError") :]
    assert "config.libero.root" in told
    assert "does not tell the tasks of libero_10" in told
    assert "Traceback" not in done.stderr
