"""Times an iteration with `rollout.pipeline_stages` 1 and 2; simulator and policy have a core each.

    python -m benchmarks.pipeline [--envs 16] [--chunks 8] [--layers 20] [--turns 5] [--out FILE]

The simulator is the miniature's world model with its shipped weights and one denoising step. The
policy is wider than the miniature's and has random weights; its number of layers is chosen so that
deciding takes about as long as imagining (both are printed). Runs with one and with two stages take
turns in one process, after a warm-up, and must collect the same episodes. `speedup` is that of
collecting an iteration's episodes, the only part that stages can shorten: the median over the turns
of the ratio of wall times.

With --learn the update follows. `iteration` is then collecting and learning one after the other,
and `ahead` is the same with two stages and train.max_staleness = 1, where the next episodes are
collected while the update is computed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.scaling import ROOT, miniature_config
from evac_jax.tools.command_line import KINDS

WIDTH = 256  # of the policy


def write_policy(folder: Path, layers: int) -> None:
    """Write a policy folder with random weights."""
    from flax import nnx

    from evac_jax.miniature.sizes import POLICY
    from evac_jax.miniature.tasks import INSTRUCTIONS
    from evac_jax.tools.policy.train import NORM_STATS
    from policies.openvla_oft.export_hf import create_policy_folder
    from policies.openvla_oft.model import OpenVLAOFT

    config = dataclasses.replace(
        POLICY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_layers=layers
    )
    model = OpenVLAOFT(config, rngs=nnx.Rngs(0))
    create_policy_folder(model, folder, tasks=INSTRUCTIONS, norm_stats=NORM_STATS)


def pin_children(core: int) -> None:
    """Bind all threads of this process's children to a core."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for thread in Path(f"/proc/{child}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


class Side:
    """A learner with its simulators, for one number of stages."""

    def __init__(self, config, core: int):
        import jax

        from evac_jax.devices import sharding
        from evac_jax.learner import Learner
        from evac_jax.shapes import EpisodeShapes
        from evac_jax.simulators import Simulators, training_specs

        mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
        self.simulators = Simulators(training_specs(config), mesh, config).wait_until_ready()
        pin_children(core)
        self.learner = Learner(config, mesh, EpisodeShapes.of(self.simulators.spec))
        self.learner.meet(self.simulators.spec)

    def collect(self) -> tuple[Any, dict[str, float]]:
        """Collect one iteration's episodes; return them and the seconds of their parts."""
        import jax

        from evac_jax.rollout import collect
        from evac_jax.telemetry.stopwatch import Stopwatch

        watch, starts = Stopwatch(), np.arange(self.simulators.num_envs)[None]
        began = time.perf_counter()
        batch, *_ = collect(
            self.learner, self.simulators, starts, seed=0, key=jax.random.key(0), watch=watch
        )
        jax.block_until_ready(batch)
        return batch, watch.take() | {"wall": time.perf_counter() - began}

    def learn(self, batch) -> float:
        """Update once; return its seconds."""
        import jax

        began = time.perf_counter()
        self.learner.update(batch, jax.random.key(1))
        return time.perf_counter() - began

    def ahead(self, batch) -> tuple[Any, float]:
        """Update with a batch and collect the next one meanwhile; return it and the seconds."""
        import jax

        began = time.perf_counter()
        update = self.learner.start_update(batch, jax.random.key(1))
        following, _ = self.collect()
        self.learner.finish_update(update)
        return following, time.perf_counter() - began


def measure(envs: int, chunks: int, layers: int, turns: int, learn: bool) -> dict[str, Any]:
    """Return times by the number of stages, in this process.

    Raises:
        SystemExit: the stages collect different episodes, or there is only one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("pipelining needs two cores, one for the simulator and one for the policy")
    os.sched_setaffinity(0, cores[:1])  # before JAX starts its threads
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_policy(Path(folder, "policy"), layers)
        sides = {}
        for name, count, staleness in (("1", 1, 0), ("2", 2, 0), ("ahead", 2, 1))[: 2 + learn]:
            config = miniature_config(envs, chunks, count)
            config = dataclasses.replace(
                config,
                policy=dataclasses.replace(config.policy, checkpoint=str(Path(folder, "policy"))),
                world_model=dataclasses.replace(config.world_model, steps=1),
                train=dataclasses.replace(config.train, max_staleness=staleness),
                algo=dataclasses.replace(config.algo, decoupled=bool(staleness)),
            )
            sides[name] = Side(config, cores[1])
            stack.callback(sides[name].simulators.close)
        return _turns(sides, turns, learn)


def _turns(sides: dict[str, Side], turns: int, learn: bool) -> dict[str, Any]:
    rollouts = {name: [] for name in ("1", "2")}
    iterations = {name: [] for name in sides}
    following = None
    for turn in range(turns + 1):
        batches = {}
        for name in rollouts:
            batches[name], parts = sides[name].collect()
            if not np.array_equal(batches[name].tokens, batches["1"].tokens) and turn == 0:
                raise SystemExit("two stages collect other episodes than one")
            seconds = parts["wall"] + (sides[name].learn(batches[name]) if learn else 0.0)
            if turn:
                rollouts[name].append(parts)
                iterations[name].append(seconds)
        if learn:
            following = following or sides["ahead"].collect()[0]
            following, seconds = sides["ahead"].ahead(following)
            if turn:
                iterations["ahead"].append(seconds)
    walls = {name: [parts["wall"] for parts in rows] for name, rows in rollouts.items()}
    told = {
        "imagine_s": statistics.median(parts["env/imagine"] for parts in rollouts["1"]),
        "simulator_s": statistics.median(parts["env"] for parts in rollouts["1"]),
        "policy_s": statistics.median(parts["rollout"] for parts in rollouts["1"]),
        "rollout_s": {name: statistics.median(values) for name, values in walls.items()},
        "speedup": float(np.median(np.divide(walls["1"], walls["2"]))),
    }
    if learn:
        told["iteration_s"] = {n: statistics.median(values) for n, values in iterations.items()}
        told["iteration_speedup"] = float(np.median(np.divide(iterations["1"], iterations["2"])))
        told["ahead_speedup"] = float(np.median(np.divide(iterations["1"], iterations["ahead"])))
    return told


def main() -> None:
    """Print the times; the last line is for programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=KINDS["count"], default=16)
    parser.add_argument("--chunks", type=KINDS["count"], default=8)
    parser.add_argument("--layers", type=KINDS["count"], default=20, help="of the policy")
    parser.add_argument("--turns", type=KINDS["count"], default=5)
    parser.add_argument("--learn", action="store_true", help="time whole iterations as well")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        told = measure(args.envs, args.chunks, args.layers, args.turns, args.learn)
        args.out.write_text(json.dumps(told))
        return
    facts = machine.describe()
    machine.show(facts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.pipeline", "--here", "--out", str(out)]
        for name in ("envs", "chunks", "layers", "turns"):
            command += [f"--{name}", str(getattr(args, name))]
        settings = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, *["--learn"] * args.learn], cwd=ROOT, env=os.environ | settings, check=True
        )
        told = json.loads(out.read_text())
    print(
        f"\n{args.envs} environments, {args.chunks} chunks: simulator {told['simulator_s']:.2f} s "
        f"(imagining {told['imagine_s']:.2f}), policy {told['policy_s']:.2f} s"
    )
    for what in ("rollout", "iteration"):
        for name, seconds in told.get(f"{what}_s", {}).items():
            stages = "2 stages, an update behind" if name == "ahead" else f"{name} stage(s)"
            print(f"{what} with {stages}: {seconds:.2f} s")
    if args.out:
        args.out.write_text(json.dumps({"machine": facts} | told, indent=2) + "\n")
    names = [name for name in ("speedup", "iteration_speedup", "ahead_speedup") if name in told]
    print("\n" + " ".join(f"{name}={told[name]:.2f}" for name in names))


if __name__ == "__main__":
    main()
