"""Measures what a robot waits for its actions, and whether they are those of an evaluation.

    python -m benchmarks.serve [--clients 2] [--requests 50] [--policy FOLDER] [--out FILE]

It starts `launch.py --mode=serve` on the miniature and drives it with clients that each ask again
as soon as they have an answer, so they wait for one another. A time is from the request to the
decoded answer. The same frames then go to the `Learner` of an evaluation, in one batch, and through
the simulators' gripper rule; `equal_to_eval` is 1 if every number is equal. `rejected_oversize` is
1 if a message above the limit ended its connection and no other, `survived_garbage` is 1 if every
message of random bytes got an error and the same connection then an answer.

The last line is `p50_ms= p99_ms= clients= equal_to_eval= rejected_oversize= survived_garbage=`.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from websockets.exceptions import ConnectionClosed

from benchmarks import machine
from benchmarks.policy_client import Client
from evac_jax.bridge.types import EnvSpec
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import load_preset
from evac_jax.config.schema import MINIATURE_WEIGHTS
from evac_jax.devices import sharding
from evac_jax.learner import Learner
from evac_jax.miniature.render import render
from evac_jax.miniature.scene import sample_scenes
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.shapes import expected_episode
from evac_jax.sim.actions import apply_gripper_rule
from evac_jax.tools.command_line import KINDS
from policies.spec import ActionSpec

ROOT = Path(__file__).parents[1]
PRESET = "configs/grpo.py"
SIZE = 64  # pixels of the miniature
LIMIT_MB = 1.0
FIRST_SCENE = 3_000_000  # neither trained nor evaluated on
GARBAGE = 50


@contextlib.contextmanager
def server(policy: str) -> Iterator[tuple[int, float]]:
    """Yield the port of a server that is ready, and the seconds it took to become so.

    Raises:
        SystemExit: it did not start.
    """
    flags = {"policy.checkpoint": policy, "serve.port": 0, "serve.max_message_mb": LIMIT_MB}
    flags["serve.image_sizes"] = f"('{SIZE}x{SIZE}',)"
    command = [sys.executable, "launch.py", f"--config={PRESET}", "--mode=serve"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                log.seek(0)
                told = log.read()
                if ready := re.search(r"ready: ws://127\.0\.0\.1:(\d+)", told):
                    break
                if process.poll() is not None:
                    raise SystemExit(told)
                time.sleep(0.05)
            yield int(ready[1]), time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def drive(port: int, frames: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Ask once for every frame; return the actions [n K A] and the milliseconds of each."""
    client, actions, times = Client(port), [], []
    for frame, task in zip(frames, tasks, strict=True):
        observation = {"observation/image": frame, "prompt": INSTRUCTIONS[task]}
        began = time.perf_counter()
        actions.append(client.infer(observation)["actions"])
        times.append(1e3 * (time.perf_counter() - began))
    client.close()
    return np.stack(actions), times


def evaluated(policy: str, frames: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Return what an evaluation would have its simulators play for these frames, [n K A]."""
    config = from_config_dict(load_preset(str(ROOT / PRESET)).to_dict())
    changed = dataclasses.replace(config.policy, checkpoint=policy)
    config = dataclasses.replace(config, policy=changed)
    episode, rows = expected_episode(config), np.arange(len(frames))
    learner = Learner(config, sharding.make_mesh(1, 1, jax.devices()[:1]), episode)
    steps = config.env.max_episode_steps
    spec = EnvSpec(len(rows), episode.image_shape, 8, ActionSpec(), INSTRUCTIONS, 1, steps)
    learner.meet(spec)
    step = SimpleNamespace(
        frames=jnp.asarray(frames[:, None]),
        result=SimpleNamespace(task=tasks),
        instructions=INSTRUCTIONS,
    )
    out = learner.sample(learner.observe(step), jax.random.key(0), rows, evaluation=True)
    moves = torch.from_numpy(np.array(out.actions))
    return apply_gripper_rule(moves, config.env.gripper).numpy()


def rejects_oversize(port: int, frame: np.ndarray) -> bool:
    """Whether a message above the limit ends its own connection only."""
    large, other = Client(port), Client(port)
    try:
        large.exchange(bytes(int(1.1 * LIMIT_MB * 2**20)))
    except ConnectionClosed as end:
        told = end.rcvd is not None and end.rcvd.code == 1009
    else:
        return False
    return told and _answers(other, frame)


def survives_garbage(port: int, frame: np.ndarray, seed: int = 0) -> bool:
    """Whether random messages all get an error on a connection that then still answers."""
    client, rng = Client(port), np.random.default_rng(seed)
    for length in rng.integers(0, 2000, GARBAGE):
        try:
            client.exchange(rng.bytes(int(length)))
        except RuntimeError:
            continue
        return False
    return _answers(client, frame)


def _answers(client: Client, frame: np.ndarray) -> bool:
    answer = client.infer({"observation/image": frame, "prompt": INSTRUCTIONS[0]})
    return np.isfinite(answer["actions"]).all()


def main() -> None:
    """Print the figures; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=KINDS["count"], default=2)
    parser.add_argument("--requests", type=KINDS["count"], default=50, help="of each client")
    parser.add_argument("--policy", default=f"{MINIATURE_WEIGHTS}/policy", help="folder")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    args = parser.parse_args()
    facts = machine.describe(packages=("websockets", "msgpack"))
    machine.show(facts)
    scenes = sample_scenes(FIRST_SCENE + np.arange(args.clients * args.requests))
    frames, tasks = render(scenes, SIZE), scenes.task
    with server(args.policy) as (port, ready_s), ThreadPoolExecutor(args.clients) as pool:
        print(f"ready after {ready_s:.1f} s", flush=True)
        parts = (np.split(part, args.clients) for part in (frames, tasks))
        done = list(pool.map(drive, [port] * args.clients, *parts))
        rejected = rejects_oversize(port, frames[0])
        survived = survives_garbage(port, frames[0])
    times = [ms for _, own in done for ms in own]
    served = np.concatenate([actions for actions, _ in done])
    p50, p99 = np.percentile(times, (50, 99))
    equal = np.array_equal(served, evaluated(args.policy, frames, tasks))
    figures = {
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "clients": args.clients,
        "equal_to_eval": int(equal),
        "rejected_oversize": int(rejected),
        "survived_garbage": int(survived),
    }
    if args.out:
        told = {"machine": facts, "ready_s": ready_s} | figures
        args.out.write_text(json.dumps(told, indent=2) + "\n")
    print(" ".join(f"{name}={value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
