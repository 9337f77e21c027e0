"""The command that serves a policy, on random weights of the smallest sizes."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.policy_client import Client
from evac_jax.bridge.types import EnvSpec
from evac_jax.devices import sharding
from evac_jax.learner import Learner
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.shapes import expected_episode
from evac_jax.sim.actions import apply_gripper_rule
from policies.spec import ActionSpec

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 1, 64, 64, 3), dtype=np.uint8)
TASKS = np.arange(8) % len(INSTRUCTIONS)
OPENPI = "openpi-client==0.1.2"


def observation(row: int) -> dict:
    """What openpi's LIBERO script sends."""
    return {
        "observation/image": FRAMES[row, 0],
        "observation/wrist_image": FRAMES[row, 0],
        "observation/state": np.zeros(8),
        "prompt": INSTRUCTIONS[TASKS[row]],
    }


@contextlib.contextmanager
def serving(launcher, *flags):
    """Yield (process, port) of a server that accepts requests."""
    process = launcher.start(
        *("--mode=serve", "--config.serve.port=0", "--config.serve.image_sizes=('64x64',)"),
        *flags,
        devices=1,
    )
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if ready := re.search(r"ready: ws://127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail("".join(told))
        yield process, int(ready[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(launcher):
    with serving(launcher) as (_, port):
        yield port


@pytest.fixture(scope="module")
def evaluated(tiny_config):
    """The actions that simulators would play in an evaluation, for FRAMES; float32 [8 K A]."""
    episode = expected_episode(tiny_config)
    learner = Learner(tiny_config, sharding.make_mesh(1, 1, jax.devices()[:1]), episode)
    learner.meet(EnvSpec(8, episode.image_shape, 8, ActionSpec(), INSTRUCTIONS, 1, 16))
    step = SimpleNamespace(
        frames=jnp.asarray(FRAMES),
        result=SimpleNamespace(task=TASKS),
        instructions=INSTRUCTIONS,
    )
    out = learner.sample(learner.observe(step), jax.random.key(5), np.arange(8), evaluation=True)
    moves = torch.from_numpy(np.array(out.actions))
    return apply_gripper_rule(moves, tiny_config.env.gripper).numpy()


def test_actions_are_those_of_the_evaluation(server, evaluated):
    client = Client(server)
    answers = [client.infer(observation(row))["actions"] for row in range(8)]
    np.testing.assert_array_equal(answers, evaluated)
    assert len({answer.tobytes() for answer in answers}) > 1
    assert client.metadata["action_chunk"] == 8
    assert client.metadata["unread_keys"] == ["observation/wrist_image", "observation/state"]


def test_health_is_answered_and_two_clients_are_served_at_once(server, evaluated):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    one, other = Client(server), Client(server)
    for row in range(2):
        np.testing.assert_array_equal(one.infer(observation(row))["actions"], evaluated[row])
        np.testing.assert_array_equal(other.infer(observation(7))["actions"], evaluated[7])
    with pytest.raises(RuntimeError, match=r"got 32x64; resize it"):
        one.infer(observation(0) | {"observation/image": FRAMES[0, 0, :32]})
    with pytest.raises(RuntimeError, match=r"policy\.max_prompt_length"):
        one.infer(observation(0) | {"prompt": "go " * 200})
    np.testing.assert_array_equal(one.infer(observation(3))["actions"], evaluated[3])


def test_signal_ends_the_server_cleanly_while_a_client_is_there(launcher):
    with serving(launcher) as (process, port):
        Client(port).infer(observation(0))
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        assert "SIGTERM: the server ends" in output
        assert "Traceback" not in output


def test_address_in_use_is_told_before_anything_is_loaded(launcher, server):
    flags = ("--mode=serve", f"--config.serve.port={server}")
    output = launcher.run(*flags, status=2, devices=1)
    assert "cannot listen on '127.0.0.1'" in output
    assert "policy weights" not in output


@pytest.mark.slow
def test_openpis_own_client_gets_the_actions_of_the_evaluation(server, evaluated, tmp_path):
    # It asks for NumPy 1 and runs with NumPy 2, so its dependencies stay away.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    target = tmp_path / "openpi"
    done = subprocess.run(
        [*command, f"--target={target}", OPENPI], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"{OPENPI} cannot be installed here: {done.stderr[-300:]}")
    np.savez(tmp_path / "sent.npz", frames=FRAMES[:, 0])
    code = f"""
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
client = WebsocketClientPolicy(host="127.0.0.1", port={server})
assert client.get_server_metadata()["action_chunk"] == 8
frames, prompts = np.load("sent.npz")["frames"], {[INSTRUCTIONS[task] for task in TASKS]!r}
try:
    client.infer({{"prompt": prompts[0]}})
except RuntimeError as error:
    assert "got none of ['observation/image']" in str(error), error
else:
    raise SystemExit("an observation without a frame was taken")
answers = [
    client.infer({{
        "observation/image": frame,
        "observation/wrist_image": frame,
        "observation/state": np.zeros(8),
        "prompt": prompt,
    }})
    for frame, prompt in zip(frames, prompts)
]
assert answers[0]["server_timing"]["infer_ms"] > 0
np.savez("got.npz", actions=[answer["actions"] for answer in answers])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "got.npz")["actions"], evaluated)
