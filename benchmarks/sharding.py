"""Checks that loss and gradients do not depend on how the trainer is sharded.

    python -m benchmarks.sharding [--layouts 1p-2x4 2p-1x2 ..] [--optimised] [--out FILE]

The real learner (import, placement, sharded state, micro-batches) makes one update of GRPO and one
of PPO, in float32, on 1 to 8 virtual CPU devices. Weights and made-up episodes are always the same.
Layout 2p-1x4 means two processes, which communicate through gloo, and a mesh of data 1 x fsdp 4.
Each layout runs in separate processes. Instead of AdamW, an optimiser is used that stores the
gradient and does not change parameters.

Three figures are compared with those of one device: the gradient norm, the gradient of each
parameter (largest difference over the largest value of that array), and the loss (difference over
the sum of the sizes of its terms, because GRPO's terms cancel). The output also shows what a
device receives in the compiled update. XLA partitions as usual, but its machine code is not
optimised, which halves the compile time; --optimised changes that. The last line is for programs;
the goal is 1e-5.
"""

import argparse
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import machine
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
GOAL = 1e-5
TIMEOUT_S = 600
QUICK = "--xla_backend_optimization_level=0"
ALGORITHMS = ("grpo", "ppo")
EPISODES, CHUNKS, GROUP, MICRO_BATCH = 8, 2, 4, 8
KEY, INSTRUCTIONS = "random", ("push the block", "lift the block")
FIGURES = {
    "loss": "actor/total_loss",
    "loss_terms": "actor/policy_loss_abs",
    "grad_norm": "actor/grad_norm",
}
COMPARED = ("loss", "grad_norm", "gradients")


@dataclass(frozen=True)
class Layout:
    """The processes and devices of an update.

    Attributes:
        processes: number of trainers; each has an equal share of the devices.
        data, fsdp: the mesh; data x fsdp devices in total.
    """

    processes: int
    data: int
    fsdp: int

    @property
    def devices(self) -> int:
        """Devices of all processes together."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"{self.processes}p-{self.data}x{self.fsdp}"

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Return the layout of a name such as 2p-1x4.

        Raises:
            argparse.ArgumentTypeError: not such a name, or devices and processes do not divide.
        """
        match = re.fullmatch(r"(\d+)p-(\d+)x(\d+)", text)
        found = cls(*(int(n) for n in match.groups())) if match else None
        if not found or found.devices % found.processes or EPISODES % found.devices:
            raise argparse.ArgumentTypeError(
                f"expected PROCESSESp-DATAxFSDP, devices dividing {EPISODES} and divisible by the "
                f"processes, such as 2p-1x4; got {text!r}"
            )
        return found


ONE = Layout(1, 1, 1)
DEFAULT = (
    *("1p-2x1", "1p-1x2", "1p-2x2", "1p-1x4", "1p-8x1", "1p-2x4", "1p-1x8"),
    *("2p-2x1", "2p-1x2", "2p-2x2"),
)


def sizes():
    """Return the sizes of the policy: small, but most parameters are large enough to be sharded."""
    from evac_jax.miniature.sizes import POLICY

    return dataclasses.replace(POLICY, num_layers=2, hidden_size=128, intermediate_size=512)


def make_policy(folder: Path) -> None:
    """Write a random policy as a checkpoint."""
    from flax import nnx

    from policies.openvla_oft.export_hf import create_policy_folder
    from policies.openvla_oft.model import OpenVLAOFT

    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    model = OpenVLAOFT(sizes(), rngs=nnx.Rngs(0))
    create_policy_folder(model, folder, tasks=INSTRUCTIONS, norm_stats={KEY: {"action": action}})


def train_config(algorithm: str, folder: Path, layout: Layout):
    """Return the configuration of a run; an iteration is one global batch of two micro-batches."""
    from evac_jax.config.build import default_config
    from evac_jax.config.schema import MeshConfig, PolicyConfig

    config, policy = default_config(algorithm), sizes()
    return dataclasses.replace(
        config,
        policy=PolicyConfig(
            checkpoint=str(folder),
            unnorm_key=KEY,
            max_prompt_length=policy.max_prompt_length,
            value_head="none" if algorithm == "grpo" else "action_level",
        ),
        algo=dataclasses.replace(
            config.algo,
            group_size=GROUP,
            global_batch=EPISODES * CHUNKS,
            micro_batch=MICRO_BATCH,
            entropy_bonus=0.01,
        ),
        env=dataclasses.replace(config.env, num_envs=EPISODES, max_episode_steps=8 * CHUNKS),
        mesh=MeshConfig(layout.data, layout.fsdp),
    )


def made_up_batch(with_values: bool):
    """Return episodes with noise as frames; half succeed, one of these in its first chunk."""
    from algos.types import RolloutBatch

    policy, random = sizes(), np.random.default_rng(0)
    size, length = policy.image_size, policy.max_prompt_length
    tokens = (EPISODES, CHUNKS, policy.chunk, policy.action_dim)
    first, bins = policy.first_action_token, policy.num_bins
    mask = np.arange(length) >= random.integers(1, length // 2, (EPISODES, 1))
    mask[:, 0] = True
    rewards = np.zeros(tokens[:3], np.float32)
    rewards[::2, -1, -1] = rewards[4, 0, -1] = 1.0
    values = random.standard_normal((EPISODES, CHUNKS + 1, policy.chunk)).astype(np.float32)
    return RolloutBatch(
        images=random.integers(0, 256, (*tokens[:2], 1, size, size, 3), np.uint8),
        prompt_tokens=random.integers(3, first, (EPISODES, length), np.int32),
        prompt_mask=mask,
        tokens=random.integers(first, first + bins, tokens, np.int32),
        # Close to the values of an untrained policy, so that some ratios are clipped.
        log_probs=(random.normal(0.0, 0.2, tokens) - np.log(bins)).astype(np.float32),
        values=values if with_values else None,
        rewards=rewards,
        terminated=rewards > 0,
        truncated=np.zeros(rewards.shape, bool),
    )


class Kept(NamedTuple):
    """State of the optimiser that keeps the gradient."""

    gradient: Any


def keep_gradient(_config):
    """Return an optimiser that changes no parameter; it replaces `algos.optim.make_optimizer`."""
    import jax
    import jax.numpy as jnp
    import optax

    def init(params):
        return Kept(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), Kept(updates)

    return optax.GradientTransformation(init, update)


def update_once(algorithm: str, folder: Path, layout: Layout) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the figures of an update on this process's mesh, and the gradients by name."""
    import jax
    from jax.experimental import multihost_utils

    from algos.types import path_name
    from evac_jax import learner as learners
    from evac_jax.devices import sharding
    from evac_jax.shapes import EpisodeShapes

    config, policy = train_config(algorithm, folder, layout), sizes()
    frame, steps = (1, policy.image_size, policy.image_size, 3), config.env.max_episode_steps
    episode = EpisodeShapes(frame, policy.chunk, steps)
    mesh = sharding.make_mesh(layout.data, layout.fsdp)
    with mock.patch.object(learners, "make_optimizer", keep_gradient):
        learner = learners.Learner(config, mesh, episode)
    share = EPISODES // layout.processes
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    rows = jax.tree.map(lambda x: x[own], made_up_batch(learner.has_value_head))
    batch, key = learner.put(rows), jax.random.key(0)
    # Compiled here to read the program; the learner then calls this compiled program.
    program = learner._update.lower(learner.state, learner._rest, batch, key).compile()
    learner._update = program
    figures = learner.update(batch, key)
    wall, cpu = time.perf_counter(), time.process_time()
    learner.update(batch, key)
    told = {
        **{name: figures[metric] for name, metric in FIGURES.items()},
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "cut": _cut_share(learner.state.params),
        "received": received(program.as_text() or ""),
    }
    gradient = learner.state.opt_state.gradient
    if layout.processes > 1:
        gradient = multihost_utils.process_allgather(gradient, tiled=True)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return told, {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def received(program: str) -> dict[str, float]:
    """Return the bytes that a device receives in a compiled program, by kind of collective."""
    from evac_jax.tools.memory.account import COLLECTIVES, account

    found = account(program)
    return {kind: found.received(kind) for kind in COLLECTIVES if found.received(kind)}


def _cut_share(params) -> float:
    """Return the share of the parameters' entries that are sharded over several devices."""
    import jax

    leaves = jax.tree.leaves(params)
    cut = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    return cut / sum(leaf.size for leaf in leaves)


def compare(told: dict, gradients: dict, reference: dict, golden: dict) -> dict[str, Any]:
    """Return relative differences from the reference: loss, norm and the worst gradient.

    Raises:
        SystemExit: the two have different parameters, or the gradient of an array is zero.
    """
    if set(gradients) != set(golden):
        raise SystemExit(f"gradients of different parameters: {set(gradients) ^ set(golden)}")
    size = max(abs(reference["loss"]), reference["loss_terms"])
    found = {
        "loss": abs(told["loss"] - reference["loss"]) / size,
        "grad_norm": abs(told["grad_norm"] / reference["grad_norm"] - 1),
    }
    of_each = {}
    for name, value in golden.items():
        largest = float(np.abs(value).max())
        if not largest > 0:
            raise SystemExit(f"{name} has no gradient: the comparison would say nothing about it")
        of_each[name] = float(np.abs(gradients[name] - value).max()) / largest
    worst = max(of_each, key=of_each.__getitem__)
    return found | {"gradients": of_each[worst], "worst": worst}


def run(
    layout: Layout, folder: Path, algorithms: tuple[str, ...], flags: str = QUICK
) -> dict[str, tuple[dict, dict]]:
    """Compute the updates in separate processes; return {algorithm: (figures, gradients)}.

    Args:
        folder: holds the policy; results are written there.
        flags: for XLA.

    Raises:
        SystemExit: a process failed or took too long; the message ends with its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags += f" --xla_force_host_platform_device_count={layout.devices // layout.processes}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    facts = json.dumps({**dataclasses.asdict(layout), "port": port, "algorithms": algorithms})
    command = [sys.executable, "-m", "benchmarks.sharding", "--work", str(folder), "--child", facts]
    deadline, processes, logs = time.monotonic() + TIMEOUT_S, [], []
    try:
        for rank in range(layout.processes):
            logs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - closed below
            processes.append(
                subprocess.Popen(
                    [*command, "--rank", str(rank)],
                    cwd=ROOT,
                    env=os.environ | settings,
                    stdout=logs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        # If one process fails, the others wait for it, so all are watched at the same time.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                raise SystemExit(f"layout {layout}: no result after {TIMEOUT_S} s")
            time.sleep(0.05)
        for rank, process in enumerate(processes):
            if process.poll():
                logs[rank].seek(0)
                raise SystemExit(
                    f"layout {layout}: process {rank} ended with {process.returncode}\n"
                    + logs[rank].read()[-4000:]
                )
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return {
        name: (
            json.loads((folder / f"{name}.json").read_text()),
            dict(np.load(folder / f"{name}.npz")),
        )
        for name in algorithms
    }


def _child(work: Path, facts: dict[str, Any], rank: int) -> None:
    import jax

    port, algorithms = facts.pop("port"), facts.pop("algorithms")
    layout = Layout(**facts)
    if layout.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", layout.processes, rank)
    for name in algorithms:
        told, gradients = update_once(name, work / "policy", layout)
        if rank == 0:
            (work / f"{name}.json").write_text(json.dumps(told))
            np.savez(work / f"{name}.npz", **gradients)  # pyright: ignore[reportArgumentType]


def measure(
    layouts: list[Layout],
    algorithms: tuple[str, ...] = ALGORITHMS,
    *,
    flags: str = QUICK,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Return one row per layout and algorithm; `on_row` gets each as soon as it is measured.

    Args:
        layouts: the others are compared with the first one.
        flags: for XLA.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="sharding.") as name:
        work = Path(name)
        make_policy(work / "policy")
        reference: dict[str, tuple[dict, dict]] = {}
        for layout in layouts:
            results = run(layout, work, algorithms, flags)
            reference = reference or results
            for algorithm, (told, gradients) in results.items():
                difference = compare(told, gradients, *reference[algorithm])
                row = {"layout": str(layout), "devices": layout.devices, "algorithm": algorithm}
                rows.append(row | {"figures": told, "difference": difference})
                on_row(rows[-1])
    return rows


def _show(row: dict[str, Any]) -> None:
    told, difference = row["figures"], row["difference"]
    sent = ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in told["received"].items())
    print(
        f"{row['layout']:8} {row['algorithm']:5}{told['cut']:5.0%}{difference['loss']:10.1e}"
        f"{difference['grad_norm']:10.1e}{difference['gradients']:10.1e}"
        f"{told['cpu_s']:8.2f}  {sent or 'nothing'}",
        flush=True,
    )


def main() -> None:
    """Print a row per layout and algorithm; the last line is for programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", type=Layout.parse, nargs="+", metavar="LAYOUT")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--optimised", action="store_true", help="optimise machine code")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file, JSON")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=KINDS["natural"], default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.work, args.child, args.rank)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only writes the policy
    facts = machine.describe()
    machine.show(facts)
    print(
        f"{'layout':8} {'':5}{'cut':>5}{'loss':>10}{'norm':>10}{'gradients':>10}{'CPU s':>8}  sent"
    )
    layouts = args.layouts or [Layout.parse(name) for name in DEFAULT]
    layouts = [ONE, *(layout for layout in layouts if layout != ONE)]
    flags = "" if args.optimised else QUICK
    rows = measure(layouts, tuple(args.algorithms), flags=flags, on_row=_show)
    largest = max(max(row["difference"][name] for name in COMPARED) for row in rows)
    worst = max(rows, key=lambda row: row["difference"]["gradients"])
    print(f"worst gradient: {worst['difference']['worst']} in {worst['layout']}; goal {GOAL:g}")
    if args.out:
        report = {"machine": facts, "goal": GOAL, "rows": rows, "max_rel_diff": largest}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"max_rel_diff={largest:.2e}")


if __name__ == "__main__":
    main()
